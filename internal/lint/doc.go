// Package lint holds the rules of this project as tests: which package may
// import which (DESIGN.md, section 3), which modules may be used and where
// (section 12), which tests back the promises (section 2), and what no Go file
// may do. A rule that is broken says what to write instead. Rules are
// changed in a commit of their own.
package lint
