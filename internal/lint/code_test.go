package lint

import (
	"bytes"
	"go/ast"
	"go/format"
	"go/token"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Limits of size. What is longer hides more than one idea.
const (
	fileLinesMax = 900
	testLinesMax = 1200 // tables of cases
	funcLinesMax = 120
)

// unsafeFiles are those that meet the kernel or shared memory.
var unsafeFiles = []string{"disk/raw_linux.go", "pmem/flush_amd64.go", "pmem/simdax.go", "pmem/staging.go", "wire/raw.go"}

// panicFiles may panic: they are told off by tests only, or they check what no
// disk, peer or user can cause.
var panicFiles = []string{"disk/crash.go", "disk/sim.go", "lsfs/fault.go", "pmem/simdax.go", "pmem/staging.go"}

// banned are calls that no code outside cmd makes, with what to do instead.
var banned = []struct {
	pkg, name string // a name that ends in * stands for all that begin so
	instead   string
}{
	{"os", "Exit", "return an error; only cmd ends the process"},
	{"log", "*", "return an error, or take a *slog.Logger"},
	{"log/slog", "Default", "take a *slog.Logger in the options"},
	{"log/slog", "SetDefault", "take a *slog.Logger in the options"},
	{"log/slog", "Info*", "take a *slog.Logger in the options"},
	{"log/slog", "Warn*", "take a *slog.Logger in the options"},
	{"log/slog", "Error*", "take a *slog.Logger in the options"},
	{"fmt", "Print*", "write to an io.Writer that the caller gives"},
	{"", "print", "write to an io.Writer that the caller gives"},
	{"", "println", "write to an io.Writer that the caller gives"},
	{"runtime", "SetFinalizer", "close it; what the collector does may never happen"},
}

// searches are the functions of package strings that judge a text by its words.
var searches = []string{"Contains", "ContainsAny", "EqualFold", "HasPrefix", "HasSuffix", "Index"}

// testName returns the name of a test or fuzz target.
func testName(d ast.Decl) (name string, ok bool) {
	fn, ok := d.(*ast.FuncDecl)
	if !ok || fn.Recv != nil {
		return "", false
	}
	name = fn.Name.Name
	return name, strings.HasPrefix(name, "Test") || strings.HasPrefix(name, "Fuzz")
}

func TestFormat(t *testing.T) {
	for _, f := range all(t) {
		formatted, err := format.Source(f.src)
		if err != nil {
			t.Errorf("%s: %v", f.path, err)
		} else if !bytes.Equal(formatted, f.src) {
			t.Errorf("%s is not formatted: run gofmt -w %s", f.path, f.path)
		}
		limit := fileLinesMax
		if f.test {
			limit = testLinesMax
		}
		if n := bytes.Count(f.src, []byte("\n")); n > limit {
			t.Errorf("%s has %d lines, more than %d: divide it by roles", f.path, n, limit)
		}
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || f.test {
				continue
			}
			if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1; n > funcLinesMax {
				errorAt(t, fn, "%s has %d lines, more than %d: divide it", fn.Name.Name, n, funcLinesMax)
			}
		}
	}
}

// TestFinished refuses marks of unfinished work.
func TestFinished(t *testing.T) {
	// In parts, so that this file does not hold what it refuses.
	marks := regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X|HA` + `CK)\b|(?i)\b(not ` + `implemented|un` + `implemented)\b`)
	for _, f := range all(t) {
		for i, line := range bytes.Split(f.src, []byte("\n")) {
			if m := marks.Find(line); m != nil {
				t.Errorf("%s:%d: %q: finish it, or say in DESIGN.md what comes [later] and refuse it with a clear error", f.path, i+1, m)
			}
		}
	}
}

func TestImportBans(t *testing.T) {
	for _, f := range all(t) {
		for i, p := range f.imports(t) {
			im := f.ast.Imports[i]
			switch {
			case im.Name != nil && im.Name.Name == ".":
				errorAt(t, im, "dot import: name the package, so that readers see where a name is from")
			case p == "C":
				errorAt(t, im, "cgo: the programs are static")
			case p == "unsafe" && !f.test && !slices.Contains(unsafeFiles, f.path):
				errorAt(t, im, "unsafe is for %v only: use encoding/binary", unsafeFiles)
			case p == "log" || p == "io/ioutil" || p == "math/rand":
				errorAt(t, im, "%s is outdated: use log/slog, io and os, math/rand/v2", p)
			case p == "testing" && !f.test:
				errorAt(t, im, "testing belongs in files that end in _test.go")
			}
		}
	}
}

func TestCallBans(t *testing.T) {
	for _, f := range all(t) {
		inCmd := strings.HasPrefix(f.pkg, "cmd/")
		ast.Inspect(f.ast, func(n ast.Node) bool {
			c, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			pkg, name := f.callee(c)
			if f.test {
				if pkg == "time" && name == "Sleep" {
					errorAt(t, c, "time.Sleep in a test: wait for the condition itself, by channel, poll with a ticker, or testing/synctest")
				}
				return true
			}
			for _, b := range banned {
				prefix, open := strings.CutSuffix(b.name, "*")
				if !inCmd && pkg == b.pkg && (name == b.name || open && strings.HasPrefix(name, prefix)) {
					errorAt(t, c, "%s: %s", strings.TrimPrefix(pkg+"."+name, "."), b.instead)
				}
			}
			if pkg == "" && name == "panic" && !slices.Contains(panicFiles, f.path) {
				errorAt(t, c, "panic: return an error; nothing that a disk, a peer or a user can cause may end the process")
			}
			if pkg == "strings" && slices.Contains(searches, name) && slices.ContainsFunc(c.Args, isErrorText) {
				errorAt(t, c, "strings.%s on an error's text: use errors.Is or errors.AsType", name)
			}
			return true
		})
	}
}

// isErrorText reports whether the expression is x.Error() of something that is
// searched in.
func isErrorText(e ast.Expr) bool {
	c, ok := e.(*ast.CallExpr)
	if !ok || len(c.Args) != 0 {
		return false
	}
	s, ok := c.Fun.(*ast.SelectorExpr)
	return ok && s.Sel.Name == "Error"
}

// TestState refuses init functions and package variables that are state. A
// package variable is an error, a table, or a pool, and nothing assigns to it.
func TestState(t *testing.T) {
	vars := make(map[string]map[string]bool) // package → names
	for _, f := range code(t) {
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				errorAt(t, fn, "init: initialise where it is needed, explicitly")
			}
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				for i, name := range v.Names {
					if name.Name == "_" {
						continue
					}
					if vars[f.pkg] == nil {
						vars[f.pkg] = make(map[string]bool)
					}
					vars[f.pkg][name.Name] = true
					if !isPool(v.Type) && (i >= len(v.Values) || !f.isConstant(v.Values[i])) {
						errorAt(t, v, "package variable %s: make it a field of what uses it; only errors, tables and pools may be variables of a package", name.Name)
					}
				}
			}
		}
	}
	for _, f := range code(t) {
		declared := vars[f.pkg]
		check := func(e ast.Expr) {
			if id := assigned(e); id != nil && declared[id.Name] && isPackageLevel(f, id) {
				errorAt(t, e, "assignment to the package variable %s: make it a field of what uses it", id.Name)
			}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch s := n.(type) {
			case *ast.AssignStmt:
				if s.Tok != token.DEFINE {
					for _, e := range s.Lhs {
						check(e)
					}
				}
			case *ast.IncDecStmt:
				check(s.X)
			}
			return true
		})
	}
}

// isPool reports whether the type is sync.Pool or an array of them.
func isPool(e ast.Expr) bool {
	if a, ok := e.(*ast.ArrayType); ok {
		e = a.Elt
	}
	s, ok := e.(*ast.SelectorExpr)
	return ok && s.Sel.Name == "Pool"
}

// isConstant reports whether the value is one that never changes by itself: a
// literal, an error, a table that a function computes from nothing.
func (f *file) isConstant(e ast.Expr) bool {
	switch v := e.(type) {
	case *ast.BasicLit, *ast.CompositeLit:
		return true
	case *ast.CallExpr:
		if _, ok := v.Fun.(*ast.FuncLit); ok {
			return len(v.Args) == 0
		}
		pkg, name := f.callee(v)
		switch pkg + "." + name {
		case "errors.New", "fmt.Errorf", "context.Background", "regexp.MustCompile", "hash/crc32.MakeTable", "strings.NewReplacer":
			return true
		}
	}
	return false
}

// assigned returns the variable that an assignment to e changes, nil if it is
// reached through a pointer or a call.
func assigned(e ast.Expr) *ast.Ident {
	switch v := e.(type) {
	case *ast.Ident:
		return v
	case *ast.IndexExpr:
		return assigned(v.X)
	case *ast.SelectorExpr:
		return assigned(v.X)
	case *ast.ParenExpr:
		return assigned(v.X)
	}
	return nil
}

// isPackageLevel reports whether the identifier means a variable of the package
// and not a local one of the same name.
func isPackageLevel(f *file, id *ast.Ident) bool {
	if id.Obj == nil {
		return true // not declared in this file, so in another one of the package
	}
	return f.ast.Scope.Lookup(id.Name) == id.Obj
}

// TestDocumented wants a comment on every package and every exported name.
func TestDocumented(t *testing.T) {
	documented := make(map[string]bool)
	for _, f := range code(t) {
		documented[f.pkg] = documented[f.pkg] || f.ast.Doc != nil
	}
	for pkg, ok := range documented {
		if !ok {
			t.Errorf("package %s has no comment: say in doc.go what idea it hides", pkg)
		}
	}
	for _, f := range code(t) {
		if f.ast.Name.Name == "main" {
			continue
		}
		for _, d := range f.ast.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Doc == nil && d.Name.IsExported() && exportedReceiver(d) && !implementsStandard(d) {
					errorAt(t, d, "%s has no comment: say units, errors, blocking, who owns buffers", d.Name.Name)
				}
			case *ast.GenDecl:
				checkSpecs(t, d)
			}
		}
	}
}

// checkSpecs wants a comment on each exported type, constant and variable, or on
// their group.
func checkSpecs(t *testing.T, d *ast.GenDecl) {
	t.Helper()
	for _, s := range d.Specs {
		switch s := s.(type) {
		case *ast.TypeSpec:
			if s.Name.IsExported() && s.Doc == nil && d.Doc == nil && s.Comment == nil {
				errorAt(t, s, "type %s has no comment", s.Name.Name)
			}
		case *ast.ValueSpec:
			if s.Names[0].IsExported() && s.Doc == nil && d.Doc == nil && s.Comment == nil {
				errorAt(t, s, "%s has no comment", s.Names[0].Name)
			}
		}
	}
}

// exportedReceiver reports whether the function is no method, or one of an
// exported type.
func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	e := d.Recv.List[0].Type
	for {
		switch v := e.(type) {
		case *ast.StarExpr:
			e = v.X
		case *ast.IndexExpr:
			e = v.X
		case *ast.Ident:
			return v.IsExported()
		default:
			return true
		}
	}
}

// implementsStandard reports whether the method is one whose meaning its
// interface says.
func implementsStandard(d *ast.FuncDecl) bool {
	return d.Recv != nil && slices.Contains([]string{"Error", "Is", "Unwrap", "String", "Len", "Less", "Swap", "Read", "Write", "Close"}, d.Name.Name)
}
