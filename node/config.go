package node

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"sealfs"
)

// configVersion is the version of config.yaml that this program writes.
const configVersion = 1

// Config is the content of DIR/config.yaml: the geometry, which is fixed when
// the directory is formatted, and options, which people may edit.
type Config struct {
	Version int         `yaml:"version"`
	Cluster sealfs.UUID `yaml:"cluster"`
	Shards  uint32      `yaml:"shards"`
	Stores  []Store     `yaml:"stores"`
	// Formatting marks a directory in which formatting has begun and not ended:
	// nothing in it has been used yet.
	Formatting bool `yaml:"formatting,omitempty"`
	// Apart marks a directory whose manager or stores have been taken over by
	// processes of their own: `sealfs manager`, `sealfs server`.
	Apart bool `yaml:"apart,omitempty"`
	// Options holds the texts of settings by their key.
	Options map[string]string `yaml:"options,omitempty"`
}

// Store says where a store lies. Relative paths count from the data directory.
type Store struct {
	ID     sealfs.UUID `yaml:"id" json:"id"`
	Device string      `yaml:"device" json:"device"`
	Region string      `yaml:"region" json:"region"`
	Size   Size        `yaml:"size" json:"size"` // of the image or device
}

// formatted reports whether there are stores to be opened.
func (c *Config) formatted() bool { return len(c.Stores) > 0 && !c.Formatting }

// Settings are the options of a run, whatever they were set by.
type Settings struct {
	Durable      bool   // every answer survives a power cut
	Staging      Size   // ring of each store
	Memory       Size   // of each store's region
	Cache        Size   // device blocks of each store
	RegionMode   string // how regions are mapped
	ScrubEvery   time.Duration
	ScrubRate    Size       // bytes a second of each store, 0: no limit
	LogLevel     slog.Level //
	LogSize      Size       // at which the log is rotated
	LogKeep      int        // rotated logs that are kept
	MountOptions string     // as after mount's -o
}

// setting describes one of the options.
type setting struct {
	key, usage, def string
	set             func(*Settings, string) error
}

// Option is one setting's effective value, and what it was set by.
type Option struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Source string `json:"source"` // "default", "file", "environment" or "flag"
	Usage  string `json:"-"`
}

// Env returns the environment variable that sets the option.
func (o Option) Env() string { return "SEALFS_" + strings.ToUpper(o.Key) }

// Flag returns the name of the flag of `sealfs up` that sets the option.
func (o Option) Flag() string { return strings.ReplaceAll(o.Key, "_", "-") }

func sizeSetting(key, usage, def string, low Size, at func(*Settings) *Size) setting {
	return setting{key, usage, def, func(s *Settings, v string) (err error) {
		n, err := ParseSize(v)
		if err == nil && n < low {
			err = fault(sealfs.ErrInvalid, "%s is less than %s", n, low)
		}
		*at(s) = n
		return err
	}}
}

var settings = []setting{
	{"durability", "what an answer survives: process (a crash of SealFS) or sync (a power cut)", "process", func(s *Settings, v string) error {
		s.Durable = v == "sync"
		if v != "process" && v != "sync" {
			return fault(sealfs.ErrInvalid, "%q is neither process nor sync", v)
		}
		return nil
	}},
	sizeSetting("staging", "ring in shared memory for what is not yet on the device, per store", "128M", 1<<20, func(s *Settings) *Size { return &s.Staging }),
	sizeSetting("memory", "memory for metadata, per store", "256M", 1<<20, func(s *Settings) *Size { return &s.Memory }),
	sizeSetting("cache", "cache of device blocks, per store", "32M", 1<<20, func(s *Settings) *Size { return &s.Cache }),
	{"region_mode", "metadata regions: dax (on persistent memory), file, or auto (dax where that is possible)", "auto", func(s *Settings, v string) error {
		s.RegionMode = v
		if v != "auto" && v != "file" && v != "dax" {
			return fault(sealfs.ErrInvalid, "%q is none of auto, file and dax", v)
		}
		return nil
	}},
	{"scrub_interval", "verify all that the disks hold so often, such as 12h or 7d; 0: only when asked", "7d", func(s *Settings, v string) (err error) {
		s.ScrubEvery, err = parseInterval(v)
		return err
	}},
	sizeSetting("scrub_rate", "bytes a second that this may read, per store; 0: no limit", "32M", 0, func(s *Settings) *Size { return &s.ScrubRate }),
	{"log_level", "debug, info, warn or error", "info", func(s *Settings, v string) error {
		if i := slices.Index([]string{"debug", "info", "warn", "error"}, v); i >= 0 {
			s.LogLevel = slog.Level(4*i) + slog.LevelDebug
			return nil
		}
		return fault(sealfs.ErrInvalid, "%q is not debug, info, warn or error", v)
	}},
	sizeSetting("log_size", "size at which the log is rotated", "16M", 4<<10, func(s *Settings) *Size { return &s.LogSize }),
	{"log_keep", "number of rotated logs that are kept", "3", func(s *Settings, v string) (err error) {
		s.LogKeep, err = strconv.Atoi(v)
		if err != nil || s.LogKeep < 0 || s.LogKeep > 1000 {
			return fault(sealfs.ErrInvalid, "%q is not a number from 0 to 1000", v)
		}
		return nil
	}},
	{"mount_options", "options of the mount, as after -o", "", func(s *Settings, v string) error {
		s.MountOptions = v
		return nil
	}},
}

// parseInterval reads a duration of time.ParseDuration, or whole days: 7d.
func parseInterval(text string) (time.Duration, error) {
	days, isDays := strings.CutSuffix(text, "d")
	if n, err := strconv.ParseUint(days, 10, 16); err == nil && isDays {
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > 0 && d < time.Minute {
		return 0, fault(sealfs.ErrInvalid, "%q is not a time of a minute at least, such as 90m, 12h or 7d, nor 0", text)
	}
	return d, nil
}

// Defaults returns all options with their default values.
func Defaults() []Option {
	var os []Option
	for _, s := range settings {
		os = append(os, Option{s.key, s.def, "default", s.usage})
	}
	return os
}

// Effective returns the options that hold for a run, and their values: flags
// go before environment variables, these before the file, it before defaults.
// flags is by the options' keys. All faults are reported at once.
func (c *Config) Effective(flags map[string]string, getenv func(string) string) (Settings, []Option, error) {
	var s Settings
	var errs []error
	list := Defaults()
	for i := range list {
		o := &list[i]
		where := ""
		if v, ok := c.Options[o.Key]; ok {
			o.Value, o.Source, where = v, "file", "config.yaml: option "+o.Key
		}
		if v := getenv(o.Env()); v != "" {
			o.Value, o.Source, where = v, "environment", "environment variable "+o.Env()
		}
		if v, ok := flags[o.Key]; ok {
			o.Value, o.Source, where = v, "flag", "flag --"+o.Flag()
		}
		if err := settings[i].set(&s, o.Value); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", where, err))
		}
	}
	return s, list, errors.Join(errs...)
}

// Config reads DIR/config.yaml. If there is none, the result is an empty
// configuration. A key that is not known is an error that names key and line.
func (d Dir) Config() (*Config, error) {
	path := d.join("config.yaml")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Config{Version: configVersion}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return parseConfig(path, text)
}

func parseConfig(path string, text []byte) (*Config, error) {
	c := &Config{Version: configVersion}
	if len(bytes.TrimSpace(text)) == 0 {
		return c, nil
	}
	if err := yaml.Load(text, c, yaml.WithKnownFields()); err != nil {
		return nil, configFault(path, err)
	}
	// What the decoder does not know: the keys of options, and their lines.
	var at struct {
		Options map[string]yaml.Node `yaml:"options"`
	}
	if err := yaml.Load(text, &at); err != nil {
		return nil, configFault(path, err)
	}
	var errs []error
	for _, key := range sortedByLine(at.Options) {
		i := slices.IndexFunc(settings, func(s setting) bool { return s.key == key })
		var err error
		if i < 0 {
			err = unknownKey(key, at.Options[key].Line, optionKeys())
		} else if e := settings[i].set(new(Settings), c.Options[key]); e != nil {
			err = fmt.Errorf("line %d: %s: %w", at.Options[key].Line, key, e)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
		}
	}
	if err := c.check(); err != nil {
		errs = append(errs, fmt.Errorf("%s: %w", path, err))
	}
	return c, errors.Join(errs...)
}

func sortedByLine(m map[string]yaml.Node) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b string) int { return m[a].Line - m[b].Line })
	return keys
}

func optionKeys() []string {
	var keys []string
	for _, s := range settings {
		keys = append(keys, s.key)
	}
	return keys
}

func unknownKey(key string, line int, known []string) error {
	return fault(sealfs.ErrInvalid, "line %d: key %q is not known: remove it, or write one of %s", line, key, strings.Join(known, ", "))
}

// configFault turns the decoder's complaints into sentences.
func configFault(path string, err error) error {
	list, ok := errors.AsType[*yaml.LoadErrors](err)
	if !ok {
		return fault(sealfs.ErrInvalid, "%s is not YAML: %v", path, err)
	}
	var errs []error
	for _, e := range list.Errors {
		what := fault(sealfs.ErrInvalid, "line %d: %s", e.Mark.Line, e.Message)
		if key, typ, ok := strings.Cut(strings.TrimPrefix(e.Message, "field "), " not found in type "); ok {
			known := []string{"version", "cluster", "shards", "stores", "formatting", "apart", "options"}
			if typ == "node.Store" {
				known = []string{"id", "device", "region", "size"}
			}
			what = unknownKey(key, e.Mark.Line, known)
		}
		errs = append(errs, fmt.Errorf("%s: %w", path, what))
	}
	return errors.Join(errs...)
}

// check reports all rules of a configuration that c breaks.
func (c *Config) check() error {
	if c.Version != configVersion {
		return fault(sealfs.ErrVersion, "version %d is not known: this program reads version %d", c.Version, configVersion)
	}
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fault(sealfs.ErrInvalid, format, args...))
		}
	}
	bad(c.Shards <= sealfs.ShardsMax && c.Shards&(c.Shards-1) == 0, "shards: %d is not a power of two up to %d", c.Shards, sealfs.ShardsMax)
	if c.Formatting || len(c.Stores) > 0 {
		bad(!c.Cluster.IsZero() && c.Shards > 0, "cluster and shards are needed where there are stores")
	}
	for i, s := range c.Stores {
		bad(!s.ID.IsZero() && s.Device != "" && s.Region != "", "store %d: id, device and region are needed", i)
		bad(slices.IndexFunc(c.Stores, func(o Store) bool { return o.ID == s.ID || o.Device == s.Device || o.Region == s.Region }) == i,
			"store %d: id, device or region is another store's too", i)
	}
	return errors.Join(errs...)
}

const configHead = `# The configuration of this SealFS data directory, written when it was formatted.
#
# What stands before "options" describes what is on the media: do not change it.
# Options may be changed; they count from the next "sealfs up" on. See "sealfs
# config show" for what holds, and "sealfs help up" for what there is.
`

// writeConfig replaces DIR/config.yaml.
func (d Dir) writeConfig(c *Config) error {
	text, err := yaml.Dump(c)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	b := append([]byte(configHead), text...)
	if len(c.Options) == 0 {
		b = append(b, "# options:\n"...)
		for _, s := range settings {
			b = fmt.Appendf(b, "#   %-28s # %s\n", strings.TrimRight(s.key+": "+s.def, " "), s.usage)
		}
	}
	if err := replaceFile(d.join("config.yaml"), b, 0o600); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	return nil
}
