package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strconv"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"sealfs/node"
	"sealfs/tree"
)

// treeCommands are those that work on trees below a mount.
func treeCommands() []command {
	return []command{
		{
			name: "rmr", group: "Trees", args: "PATH...", min: 1, max: math.MaxInt, json: true,
			short: "Delete files, and directories with all that is in them, with many workers",
			long: `
Does what ` + "`rm -rf --one-file-system`" + ` does, faster: several directories are emptied at
once. Symbolic links are removed, never followed, and what is mounted within a tree
stays. What cannot be removed is named, and the rest is removed nevertheless. Paths that
are not on SealFS are refused, unless --anywhere is given. Nothing is asked first. Ctrl-C
ends it: what was not removed yet stays.`,
			examples: []string{
				"sealfs rmr /mnt/sealfs/old-builds",
				"sealfs rmr --jobs 16 /mnt/sealfs/a /mnt/sealfs/b",
				"sealfs rmr --json --force /mnt/sealfs/maybe | jq .files",
			},
			setup: setupRemove,
		},
		{
			name: "du", group: "Trees", args: "[PATH...]", max: math.MaxInt, json: true,
			short: "Show what trees hold: bytes, files, directories",
			long: `
On SealFS each directory knows what the tree below it holds, so this takes one question
for each line printed, however large the tree is. Bytes are the sizes of the files, once
for each name, also where they have holes. What has just been changed counts a moment
later. Elsewhere, and in volumes that were made before directories had totals, it walks. The
same numbers are extended attributes: sealfs.dir.bytes, sealfs.dir.files, sealfs.dir.dirs.`,
			examples: []string{
				"sealfs du /mnt/sealfs",
				"sealfs du -d 1 /mnt/sealfs/home",
				"sealfs du --json -d 2 /mnt/sealfs | jq '.[] | select(.files > 100000).path'",
			},
			setup: setupMeasure,
		},
	}
}

func setupMeasure(f *pflag.FlagSet) func(context.Context, *call) error {
	depth := f.IntP("max-depth", "d", 0, "show directories so many `levels` below the paths, too")
	exact := f.BoolP("bytes", "b", false, "show bytes as plain numbers")
	return func(ctx context.Context, c *call) error {
		if *depth < 0 {
			return usagef("--max-depth %d: 0 or more", *depth)
		}
		paths := c.args
		if len(paths) == 0 {
			paths = []string{"."}
		}
		list := []tree.Usage{}
		t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
		if !c.json {
			fmt.Fprintln(t, "BYTES\tFILES\tDIRS\tPATH")
		}
		var failed []error
		for _, p := range paths {
			err := tree.Measure(ctx, p, *depth, func(u tree.Usage) error {
				size := node.Size(u.Bytes).About()
				if *exact {
					size = strconv.FormatUint(u.Bytes, 10)
				}
				if c.json {
					list = append(list, u)
				} else {
					fmt.Fprintf(t, "%s\t%d\t%d\t%s\n", size, u.Files, u.Dirs, u.Path)
				}
				return nil
			})
			if err != nil {
				failed = append(failed, err)
			}
		}
		if c.json {
			failed = append(failed, writeJSON(c.out, list))
		} else {
			failed = append(failed, t.Flush())
		}
		return errors.Join(failed...)
	}
}

// removal is what rmr prints.
type removal struct {
	Files   int64    `json:"files"`
	Dirs    int64    `json:"dirs"`
	Failed  int64    `json:"failed"`
	Errors  []string `json:"errors"` // the first hundred
	Seconds float64  `json:"seconds"`
}

// removalErrors bounds the errors that --json repeats.
const removalErrors = 100

func setupRemove(f *pflag.FlagSet) func(context.Context, *call) error {
	jobs := f.IntP("jobs", "j", max(8, 2*runtime.NumCPU()), "directories that are emptied at once")
	force := f.BoolP("force", "f", false, "a path that does not exist is no error")
	anywhere := f.Bool("anywhere", false, "also on other file systems than SealFS")
	quiet := f.BoolP("quiet", "q", false, "do not tell how far it is every five seconds")
	return func(ctx context.Context, c *call) error {
		if *jobs < 1 || *jobs > 1024 {
			return usagef("--jobs %d: a number from 1 to 1024", *jobs)
		}
		r := removal{Errors: []string{}}
		// A single error is told by the command's end, of several each when it occurs.
		o := tree.Options{Jobs: *jobs, Force: *force, Failed: func(err error) {
			if len(r.Errors) == 1 {
				fmt.Fprintf(c.stderr, "sealfs: rmr: %s\n", r.Errors[0])
			}
			if len(r.Errors) > 0 {
				fmt.Fprintf(c.stderr, "sealfs: rmr: %v\n", err)
			}
			if len(r.Errors) < removalErrors {
				r.Errors = append(r.Errors, err.Error())
			}
		}}
		if !*anywhere {
			o.Allow = func(path string, dev uint64) error {
				if err := node.CheckOurs(path, dev); err != nil {
					return fmt.Errorf("%w; --anywhere removes it nevertheless", err)
				}
				return nil
			}
		}
		var n tree.Removed
		begun := time.Now()
		ended := make(chan struct{})
		var telling sync.WaitGroup
		if !*quiet {
			telling.Go(func() { tellRemoved(c, &n, begun, ended) })
		}
		err := tree.Remove(ctx, o, c.args, &n)
		close(ended)
		telling.Wait()
		r.Files, r.Dirs, r.Failed, r.Seconds = n.Files.Load(), n.Dirs.Load(), n.Failed.Load(), time.Since(begun).Seconds()
		if c.json {
			err = errors.Join(writeJSON(c.out, r), err)
		}
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("ended by a signal: %d files and %d directories were removed, the rest stays", r.Files, r.Dirs)
		case r.Failed > 1:
			return fmt.Errorf("%d files and %d directories were removed, %d could not be", r.Files, r.Dirs, r.Failed)
		}
		return err
	}
}

// tellRemoved says how far a long removal is.
func tellRemoved(c *call, n *tree.Removed, begun time.Time, ended <-chan struct{}) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	before := int64(0)
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
			files, dirs := n.Files.Load(), n.Dirs.Load()
			fmt.Fprintf(c.stderr, "sealfs: rmr: %d files, %d directories after %v, %d a second\n",
				files, dirs, time.Since(begun).Round(time.Second), (files+dirs-before)/5)
			before = files + dirs
		}
	}
}
