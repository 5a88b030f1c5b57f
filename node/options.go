package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"sealfs"
)

// The kinds of a role's options.
const (
	OptionText = iota
	OptionFlag // yes or no
	OptionList // may be given several times, and is a list in YAML
)

// RoleOption is one option of a role: a flag of its command, the environment
// variable SEALFS_KEY, and a key of its YAML file.
type RoleOption struct {
	Key, Usage, Default string
	Kind                int
}

// Flag returns the name of the flag.
func (o RoleOption) Flag() string { return strings.ReplaceAll(o.Key, "_", "-") }

// RoleOptions returns the options of a role, nil if it is none.
func RoleOptions(role string) []RoleOption {
	of := func(keys ...string) (list []RoleOption) {
		for _, o := range Defaults() {
			if slices.Contains(keys, o.Key) {
				list = append(list, RoleOption{Key: o.Key, Usage: o.Usage, Default: o.Value})
			}
		}
		return list
	}
	listen := func(def string) []RoleOption {
		return []RoleOption{
			{"listen", "`HOST:PORT` to listen at; port 0 takes a free one", def, OptionText},
			{"advertise", "`HOST:PORT` that others shall use, if it is not the one to listen at", "", OptionText},
			{"insecure_listen", "allow addresses beyond this machine: whoever reaches them may do everything", "", OptionFlag},
		}
	}
	logs := of("log_level", "log_size", "log_keep")
	switch role {
	case RoleManager:
		return slices.Concat(listen(DefaultManagerAddr), []RoleOption{
			{"bootstrap", "make a new cluster if there is no manager in DIR yet", "", OptionFlag},
			{"join", "join the cluster of these `managers`, HOST:PORT separated by commas, if there is no manager in DIR yet", "", OptionText},
			{"name", "`name` of a new cluster", "sealfs", OptionText},
			{"shards", "number of shards of a new cluster, a power of two, fixed for ever", strconv.Itoa(sealfs.ShardsDefault), OptionText},
		}, logs)
	case RoleServer:
		return slices.Concat([]RoleOption{
			{"manager", "addresses of the `managers`, HOST:PORT separated by commas", "", OptionText},
		}, listen(DefaultServerAddr), []RoleOption{
			{"host", "`name` of the machine, a failure domain (default: its host name)", "", OptionText},
			{"rack", "`name` of the rack, a failure domain", "", OptionText},
			{"disk", "`DEVICE`[,region=FILE][,size=SIZE][,weight=N][,format]: a disk to serve, remembered from then on; may be repeated", "", OptionList},
		}, of("durability", "staging", "memory", "cache", "region_mode", "scrub_interval", "scrub_rate"), logs)
	case RoleDaemon:
		return logs
	}
	return nil
}

// Values are a role's options as they hold for a run, with what set them.
type Values struct {
	role   string
	values map[string][]string
	source map[string]string
}

// Gather finds the options of a role: flags go before environment variables,
// these before the file, it before defaults. file is the path of a YAML file; if
// it is empty, ROLE.yaml in the directory that SEALFS_CONFIG_PATH names, if there
// is such a file. All faults are reported at once.
func Gather(role, file string, flags map[string][]string, getenv func(string) string) (*Values, error) {
	v := &Values{role, make(map[string][]string), make(map[string]string)}
	options := RoleOptions(role)
	for _, o := range options {
		if o.Default != "" {
			v.set(o.Key, "default", o.Default)
		}
	}
	if err := v.read(file, options, getenv); err != nil {
		return nil, err
	}
	for _, o := range options {
		name := "SEALFS_" + strings.ToUpper(o.Key)
		if text := getenv(name); text != "" && o.Kind == OptionList {
			v.set(o.Key, "environment variable "+name, strings.Fields(text)...)
		} else if text != "" {
			v.set(o.Key, "environment variable "+name, text)
		}
		if text, ok := flags[o.Key]; ok {
			v.set(o.Key, "flag --"+o.Flag(), text...)
		}
	}
	var errs []error
	for _, o := range options {
		if o.Kind == OptionFlag && v.Text(o.Key) != "" {
			if _, err := strconv.ParseBool(v.Text(o.Key)); err != nil {
				errs = append(errs, v.fault(o.Key, fault(sealfs.ErrInvalid, "%q is neither true nor false", v.Text(o.Key))))
			}
		}
	}
	return v, errors.Join(errs...)
}

func (v *Values) set(key, source string, values ...string) {
	v.values[key], v.source[key] = values, source
}

// read takes values from a file.
func (v *Values) read(file string, options []RoleOption, getenv func(string) string) error {
	wanted := file != ""
	if dir := getenv("SEALFS_CONFIG_PATH"); !wanted && dir != "" {
		file = filepath.Join(dir, v.role+".yaml")
	}
	if file == "" {
		return nil
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && !wanted {
		return nil
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	var nodes map[string]yaml.Node
	if err := yaml.Load(text, &nodes); err != nil {
		return configFault(file, err)
	}
	var known []string
	for _, o := range options {
		known = append(known, o.Key)
	}
	var errs []error
	for _, key := range sortedByLine(nodes) {
		n := nodes[key]
		var list []string
		var err error
		i := slices.IndexFunc(options, func(o RoleOption) bool { return o.Key == key })
		switch {
		case i < 0:
			err = unknownKey(key, n.Line, known)
		case n.Kind == yaml.ScalarNode && options[i].Kind != OptionList:
			list = []string{n.Value}
		case n.Load(&list) != nil:
			err = fault(sealfs.ErrInvalid, "line %d: %s: a text is needed, or a list of texts", n.Line, key)
		case options[i].Kind != OptionList: // addresses, as a list
			list = []string{strings.Join(list, ",")}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", file, err))
			continue
		}
		v.set(key, fmt.Sprintf("%s, line %d", file, n.Line), list...)
	}
	return errors.Join(errs...)
}

// Text returns the value of an option, "" if it is not set.
func (v *Values) Text(key string) string {
	if list := v.values[key]; len(list) > 0 {
		return list[len(list)-1]
	}
	return ""
}

// List returns all values of an option.
func (v *Values) List(key string) []string { return v.values[key] }

// Yes reports whether an option of kind OptionFlag is set.
func (v *Values) Yes(key string) bool {
	yes, _ := strconv.ParseBool(v.Text(key))
	return yes
}

// fault says where a wrong value comes from.
func (v *Values) fault(key string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s (%s): %w", key, v.source[key], err)
}

// settings returns those options that are settings of `sealfs up` as well.
func (v *Values) settings() (Settings, error) {
	var s Settings
	var errs []error
	for _, x := range settings {
		text := x.def
		if v.values[x.key] != nil {
			text = v.Text(x.key)
		}
		if err := x.set(&s, text); err != nil {
			errs = append(errs, v.fault(x.key, err))
		}
	}
	return s, errors.Join(errs...)
}

// listen returns where the role listens.
func (v *Values) listen() Listen {
	return Listen{Addr: v.Text("listen"), Advertise: v.Text("advertise"), Insecure: v.Yes("insecure_listen")}
}
