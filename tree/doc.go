// Package tree works on whole trees of a mounted file system, from the side of a
// program: it deletes them with many workers, and adds up what they hold. All
// names are looked up relative to an open directory, so that renames under way lead it
// nowhere else; symbolic links are never followed, and other file systems that are
// mounted within a tree are left alone.
package tree
