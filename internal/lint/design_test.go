package lint

import (
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// module is the import path of the module.
const module = "sealfs"

// section returns the lines of a numbered section of DESIGN.md.
func section(t *testing.T, number string) []string {
	t.Helper()
	text, err := os.ReadFile(root + "/DESIGN.md")
	if err != nil {
		t.Fatal(err)
	}
	_, body, found := strings.Cut(string(text), "\n## "+number+" ")
	if !found {
		t.Fatalf("DESIGN.md has no section %s", number)
	}
	body, _, _ = strings.Cut(body, "\n## ")
	return strings.Split(body, "\n")
}

// table returns the cells of the rows of the section's table whose heading
// begins with the given cell.
func table(t *testing.T, number, heading string) [][]string {
	t.Helper()
	var rows [][]string
	in := false
	for _, line := range section(t, number) {
		if !strings.HasPrefix(line, "|") {
			in = false
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		switch {
		case cells[0] == heading:
			in = true
		case in && !strings.HasPrefix(cells[0], "---"):
			rows = append(rows, cells)
		}
	}
	if len(rows) == 0 {
		t.Fatalf("section %s of DESIGN.md has no table that begins with %q", number, heading)
	}
	return rows
}

// anything stands in the table for packages that may import all others.
const anything = "anything"

// packageNames splits a cell of the table of packages; what stands in
// parentheses is for the reader.
func packageNames(cell string) []string {
	cell = regexp.MustCompile(`\([^)]*\)`).ReplaceAllString(cell, "")
	var names []string
	for name := range strings.SplitSeq(cell, ",") {
		name = strings.Trim(strings.TrimSpace(name), "`")
		switch name {
		case "", "–":
			continue
		case "enc":
			name = "internal/enc"
		case module:
			name = "."
		}
		names = append(names, name)
	}
	return names
}

// mayImport reads the table of section 3: package → packages of ours that it may import.
func mayImport(t *testing.T) map[string][]string {
	t.Helper()
	m := make(map[string][]string)
	for _, row := range table(t, "3", "package") {
		for _, name := range packageNames(row[0]) {
			m[name] = packageNames(row[len(row)-1])
		}
	}
	return m
}

// TestImports holds the tree against the table of DESIGN.md. Every package may
// import the root, which is the vocabulary. Tests may import what they need.
func TestImports(t *testing.T) {
	allowed := mayImport(t)
	present := make(map[string]bool)
	lookup := func(pkg string) (list []string, known bool) {
		if list, known = allowed[pkg]; !known {
			list, known = allowed[path.Dir(pkg)+"/*"]
		}
		return list, known
	}
	said := make(map[string]bool) // one complaint for each pair of packages
	for _, f := range code(t) {
		list, known := lookup(f.pkg)
		if !known && !present[f.pkg] {
			t.Errorf("package %s is missing from the table in section 3 of DESIGN.md", f.pkg)
		}
		present[f.pkg] = true
		if !known {
			continue
		}
		for _, p := range f.imports(t) {
			rel, ours := strings.CutPrefix(p, module+"/")
			if !ours || slices.Contains(list, anything) || slices.Contains(list, rel) || said[f.pkg+" "+rel] {
				continue
			}
			said[f.pkg+" "+rel] = true
			t.Errorf("%s: %s may not import %s: section 3 of DESIGN.md allows %v", f.path, f.pkg, rel, list)
		}
	}
	for _, pkg := range slices.Sorted(maps.Keys(allowed)) {
		for _, name := range append(slices.Clone(allowed[pkg]), pkg) {
			if name != anything && !strings.HasSuffix(name, "/*") && !present[name] {
				t.Errorf("section 3 of DESIGN.md names %q (row %s), which is no package", name, pkg)
			}
		}
	}
}

// owners says which packages alone may import a module: each foreign interface
// is met in one place. A name that ends in / stands for all below it.
var owners = []struct {
	prefix string
	pkgs   []string
}{
	{"github.com/hanwen/go-fuse/", []string{"client"}},
	{"github.com/hashicorp/", []string{"cluster"}},
	{"go.etcd.io/bbolt", []string{"cluster"}},
	{"github.com/edsrzf/mmap-go", []string{"pmem"}},
	{"github.com/spf13/pflag", []string{"cmd/"}},
	{"go.yaml.in/yaml/", []string{"node", "fsck"}},
	// Pure packages have no business with the system.
	{"golang.org/x/sys/", []string{"bench", "client", "cluster", "cmd/", "disk", "fsck", "node", "internal/linear", "pmem", "server", "tree", "wire", "e2e"}},
}

// TestModules holds the imports of other modules against section 12 of
// DESIGN.md, which names each with its reason, and against owners.
func TestModules(t *testing.T) {
	var named []string
	for _, row := range table(t, "12", "module") {
		for name := range strings.SplitSeq(row[0], ",") {
			named = append(named, strings.TrimSpace(name))
		}
	}
	used := make(map[string]bool)
	for _, f := range all(t) {
		for _, p := range f.imports(t) {
			if first, _, _ := strings.Cut(p, "/"); !strings.Contains(first, ".") {
				continue // the standard library, or ours
			}
			i := slices.IndexFunc(named, func(name string) bool {
				return strings.Contains(p+"/", "/"+name+"/") || strings.HasPrefix(p+"/", name+"/")
			})
			if i < 0 {
				t.Errorf("%s: %s is not in section 12 of DESIGN.md: use the standard library, or add it there with its reason", f.path, p)
				continue
			}
			used[named[i]] = true
			for _, o := range owners {
				if strings.HasPrefix(p, o.prefix) && !f.test && !within(f.pkg, o.pkgs) {
					t.Errorf("%s: only %v may import %s: call it through that package", f.path, o.pkgs, p)
				}
			}
		}
	}
	for _, name := range named {
		if !used[name] {
			t.Errorf("section 12 of DESIGN.md names %s, which nothing imports", name)
		}
	}
}

// within reports whether pkg is in the list, or below a name in it that ends in /.
func within(pkg string, list []string) bool {
	return slices.ContainsFunc(list, func(name string) bool {
		return pkg == name || strings.HasSuffix(name, "/") && strings.HasPrefix(pkg, name)
	})
}

// TestPromises checks that each promise of section 2 names tests, and that
// there are such tests in the packages it names.
func TestPromises(t *testing.T) {
	tests := make(map[string][]string) // package → names of its tests
	for _, f := range all(t) {
		for _, d := range f.ast.Decls {
			if name, ok := testName(d); ok && f.test {
				tests[f.pkg] = append(tests[f.pkg], name)
			}
		}
	}
	token := regexp.MustCompile("`([^`]+)`|\\b((?:Test|Fuzz)\\w*)")
	for _, row := range table(t, "2", "#") {
		cell := row[len(row)-1]
		proofs := 0
		var pkgs []string
		fresh := true // the next package begins a new group
		for _, m := range token.FindAllStringSubmatch(cell, -1) {
			switch {
			case strings.HasPrefix(m[1], "make "):
				proofs++
			case m[1] != "":
				if fresh {
					pkgs, fresh = nil, false
				}
				pkgs = append(pkgs, m[1])
			default:
				proofs, fresh = proofs+1, true
				in := pkgs
				if len(in) == 0 {
					in = slices.Collect(maps.Keys(tests))
				}
				if !slices.ContainsFunc(in, func(pkg string) bool {
					return slices.ContainsFunc(tests[pkg], func(name string) bool { return strings.HasPrefix(name, m[2]) })
				}) {
					t.Errorf("promise %s: none of %v has a test whose name begins with %s", row[0], pkgs, m[2])
				}
			}
		}
		if proofs == 0 {
			t.Errorf("promise %s (%s) names no test", row[0], row[1])
		}
	}
}
