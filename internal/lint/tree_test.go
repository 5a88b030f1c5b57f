package lint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// root is the module's root as seen from this package.
const root = "../.."

// A file is one Go file of the module.
type file struct {
	path string // from the module's root, with slashes
	pkg  string // its directory; "." is the root
	test bool
	src  []byte
	ast  *ast.File
}

// fset knows the positions of all files.
var fset = token.NewFileSet()

// tree parses all Go files of the module once. Nested modules are not of it.
var tree = sync.OnceValues(func() (files []*file, err error) {
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, err := os.Stat(filepath.Join(p, "go.mod"))
			if nested := err == nil && rel != "."; nested || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && rel != "." {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		f := &file{path: filepath.ToSlash(rel), test: strings.HasSuffix(p, "_test.go")}
		f.pkg = path.Dir(f.path)
		if f.src, err = os.ReadFile(p); err != nil {
			return err
		}
		f.ast, err = parser.ParseFile(fset, f.path, f.src, parser.ParseComments)
		files = append(files, f)
		return err
	})
	return files, err
})

// all returns the files of the module.
func all(t *testing.T) []*file {
	t.Helper()
	files, err := tree()
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 20 {
		t.Fatalf("only %d Go files were found: is %q the module's root?", len(files), root)
	}
	return files
}

// code returns the files that are not tests.
func code(t *testing.T) []*file {
	t.Helper()
	var files []*file
	for _, f := range all(t) {
		if !f.test {
			files = append(files, f)
		}
	}
	return files
}

// errorAt reports a broken rule at a node.
func errorAt(t *testing.T, n ast.Node, format string, args ...any) {
	t.Helper()
	t.Errorf("%s: "+format, append([]any{fset.Position(n.Pos())}, args...)...)
}

// imports returns the paths that the file imports.
func (f *file) imports(t *testing.T) []string {
	t.Helper()
	var paths []string
	for _, im := range f.ast.Imports {
		p, err := strconv.Unquote(im.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
	}
	return paths
}

// callee returns the package's path and the name of a call such as os.Exit;
// "" and the name for a plain call such as panic.
func (f *file) callee(c *ast.CallExpr) (pkg, name string) {
	switch fn := c.Fun.(type) {
	case *ast.Ident:
		return "", fn.Name
	case *ast.SelectorExpr:
		x, ok := fn.X.(*ast.Ident)
		if !ok || x.Obj != nil { // a variable, not a package
			return "?", fn.Sel.Name
		}
		for _, im := range f.ast.Imports {
			p, _ := strconv.Unquote(im.Path.Value)
			if im.Name != nil && im.Name.Name == x.Name || im.Name == nil && path.Base(p) == x.Name {
				return p, fn.Sel.Name
			}
		}
		return "?", fn.Sel.Name
	}
	return "?", ""
}
