package node

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"sealfs"
)

func testDir(t *testing.T) Dir {
	t.Helper()
	d, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.make(); err != nil {
		t.Fatal(err)
	}
	return d
}

func noEnv(string) string { return "" }

func TestConfigSurvives(t *testing.T) {
	d := testDir(t)
	none, err := d.Config()
	if err != nil || none.formatted() {
		t.Fatalf("without a file: %+v, %v", none, err)
	}
	want := &Config{Version: 1, Cluster: sealfs.NewUUID(), Shards: 4096, Stores: []Store{{ID: sealfs.NewUUID(), Device: "stores/0/device.img", Region: "stores/0/region", Size: 4 << 30}}}
	for range 2 { // the second time with options
		if err := d.writeConfig(want); err != nil {
			t.Fatal(err)
		}
		got, err := d.Config()
		if err != nil {
			t.Fatal(err)
		}
		if got.Cluster != want.Cluster || got.Shards != 4096 || len(got.Stores) != 1 || got.Stores[0] != want.Stores[0] || !got.formatted() || got.Options["cache"] != want.Options["cache"] {
			t.Fatalf("read %+v, wrote %+v", got, want)
		}
		want.Options = map[string]string{"cache": "8M"}
	}
	// The commented options in the file are the ones there are, with values that count.
	delete(want.Options, "cache")
	if err := d.writeConfig(want); err != nil {
		t.Fatal(err)
	}
	text, _ := os.ReadFile(d.join("config.yaml"))
	at := strings.Index(string(text), "# options:")
	if at < 0 {
		t.Fatalf("no options in:\n%s", text)
	}
	live := string(text[:at]) + strings.ReplaceAll("\n"+string(text[at:]), "\n# ", "\n")
	c, err := parseConfig("config.yaml", []byte(live))
	if err != nil {
		t.Fatalf("uncommented: %v\n%s", err, live)
	}
	if len(c.Options) != len(settings) {
		t.Errorf("%d options of %d", len(c.Options), len(settings))
	}
}

func TestConfigFaults(t *testing.T) {
	for text, want := range map[string]string{
		"version: 1\nshard: 16\n":             `c.yaml: line 2: key "shard" is not known`,
		"stores:\n  - devise: a\n":            `c.yaml: line 2: key "devise" is not known: remove it, or write one of id, device`,
		"options:\n  cache: 1M\n  cash: 2M\n": `c.yaml: line 3: key "cash" is not known`,
		"options:\n  durability: maybe\n":     `c.yaml: line 2: durability: "maybe" is neither`,
		"options:\n  cache: 12GB\n":           `c.yaml: line 2: cache: "12GB" is not a size`,
		"options:\n  cache: 1\n":              `c.yaml: line 2: cache: 1 is less than 1M`,
		"version: 2\n":                        `c.yaml: version 2 is not known: this program reads version 1`,
		"version: 1\nversion: 1\n":            `c.yaml: line 2: mapping key "version" already defined`,
		"shards: 3\n":                         `c.yaml: shards: 3 is not a power of two`,
		"shards: -1\n":                        `c.yaml: line 1: `,
		"cluster: x\n":                        `c.yaml: line 1: "x" is not a UUID`,
		"a: [\n":                              `c.yaml is not YAML`,
		"formatting: true\n":                  `c.yaml: cluster and shards are needed`,
		"shards: 1\ncluster: " + sealfs.NewUUID().String() + "\nstores: [{device: a, region: b, size: 1G}]": `c.yaml: store 0: id, device and region are needed`,
	} {
		_, err := parseConfig("c.yaml", []byte(text))
		if err == nil || !strings.HasPrefix(err.Error(), want) || !errors.Is(err, sealfs.ErrInvalid) && !errors.Is(err, sealfs.ErrVersion) {
			t.Errorf("%q gives\n%v, want\n%s", text, err, want)
		}
	}
	// All at once, in the order of the lines.
	_, err := parseConfig("c.yaml", []byte("options:\n  zzz: 1\n  aaa: 2\n"))
	if err == nil || strings.Index(err.Error(), "zzz") > strings.Index(err.Error(), "aaa") {
		t.Errorf("two unknown options give %v", err)
	}
}

func TestEffective(t *testing.T) {
	c := &Config{Options: map[string]string{"cache": "2M", "staging": "3M", "log_keep": "7"}}
	env := func(k string) string {
		return map[string]string{"SEALFS_STAGING": "4M", "SEALFS_LOG_LEVEL": "debug"}[k]
	}
	s, list, err := c.Effective(map[string]string{"log_level": "error"}, env)
	if err != nil {
		t.Fatal(err)
	}
	if s.Cache != 2<<20 || s.Staging != 4<<20 || s.LogKeep != 7 || s.LogLevel != slog.LevelError || s.Durable || s.Memory != 256<<20 {
		t.Errorf("settings %+v", s)
	}
	source := make(map[string]string)
	for _, o := range list {
		source[o.Key] = o.Source
	}
	for k, want := range map[string]string{"cache": "file", "staging": "environment", "log_level": "flag", "memory": "default"} {
		if source[k] != want {
			t.Errorf("%s comes from %q, want %q", k, source[k], want)
		}
	}
	_, _, err = c.Effective(map[string]string{"cache": "x", "durability": "y"}, noEnv)
	if err == nil || !strings.Contains(err.Error(), "flag --cache: ") || !strings.Contains(err.Error(), "flag --durability: ") {
		t.Errorf("two faults give %v", err)
	}
	for _, o := range Defaults() {
		if o.Usage == "" || o.Env() == "" {
			t.Errorf("option %s is not described", o.Key)
		}
	}
}

// FuzzConfig: whatever stands in the file, it is read or refused with its name.
func FuzzConfig(f *testing.F) {
	f.Add([]byte("version: 1\nshards: 16\noptions: {cache: 1M}\n"))
	f.Add([]byte("stores:\n  - {id: 0, device: a}\n  - 3\n"))
	f.Add([]byte("options:\n  - a\n---\nb: *c\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseConfig("c.yaml", text)
		if err != nil && !strings.HasPrefix(err.Error(), "c.yaml") || err == nil && c.check() != nil {
			t.Errorf("%v, %v", c, err)
		}
	})
}
