package demo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/rules"
)

// The hosts of the lab.
const (
	sourceHost = "source"
	relayHost  = "relay"
)

// sinkHosts are in the order of the relay's interfaces eth1, eth2 and eth3.
func sinkHosts() []string { return []string{"sink1", "sink2", "sink3"} }

func labHosts() []string { return append([]string{sourceHost, relayHost}, sinkHosts()...) }

// places are the names and locations of a lab.
type places struct{ prefix string }

func (p places) namespace(host string) string { return p.prefix + "-" + host }
func (p places) runDir() string               { return "/run/" + p.prefix + "-demo" }
func (p places) pinDir() string               { return "/sys/fs/bpf/" + p.prefix + "_demo" }
func (p places) socket() string               { return filepath.Join(p.runDir(), "xdpcast.sock") }
func (p places) rulesFile() string            { return filepath.Join(p.runDir(), "rules.yaml") }
func (p places) logFile() string              { return filepath.Join(p.runDir(), "relay.log") }

// removal is the command that removes the lab.
func (p places) removal() string {
	if p.prefix == DefaultPrefix {
		return "xdpcast demo --remove"
	}
	return "xdpcast demo --remove --prefix " + p.prefix
}

// found lists existing parts of the lab: none before it is made and after it is removed.
func (p places) found() ([]string, error) {
	paths := []string{p.runDir()}
	for _, host := range labHosts() {
		paths = append(paths, filepath.Join(lab.RunDir, p.namespace(host)))
	}
	var there []string
	for _, path := range append(paths, p.pinDir()) {
		switch _, err := os.Lstat(path); {
		case err == nil:
			there = append(there, path)
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
	}
	staging, err := p.staging()
	return append(there, staging...), err
}

// staging lists the pins of a relay that was killed before it published them.
func (p places) staging() ([]string, error) { return filepath.Glob(p.pinDir() + "_new_*") }

// claim creates the run directory, which marks everything with the lab's names as the demo's own.
func (p places) claim() error {
	there, err := p.found()
	if err != nil {
		return err
	}
	if len(there) > 0 {
		return p.taken(there[0])
	}
	if err := os.Mkdir(p.runDir(), 0o755); errors.Is(err, fs.ErrExist) {
		return p.taken(p.runDir())
	} else if err != nil {
		return err
	}
	return nil
}

func (p places) taken(path string) error {
	if _, err := os.Lstat(p.runDir()); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s already exists, and not from a demo: remove it, or choose another name with --prefix", path)
	}
	return fmt.Errorf("%s already exists: \"%s\" removes that lab, --prefix makes another one", path, p.removal())
}

// remove removes everything except running processes. It can be repeated until it succeeds: the run
// directory, the mark, goes last.
func (p places) remove() error {
	var errs []error
	if err := loader.Unload(loader.Options{PinDir: p.pinDir(), RunDir: p.runDir()}); err != nil && !errors.Is(err, loader.ErrNotLoaded) {
		errs = append(errs, err)
	}
	staging, err := p.staging()
	errs = append(errs, err)
	for _, dir := range staging {
		errs = append(errs, os.RemoveAll(dir))
	}
	for _, host := range labHosts() {
		errs = append(errs, lab.Remove(p.namespace(host)))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.RemoveAll(p.runDir()); err != nil {
		return err
	}
	there, err := p.found()
	if len(there) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(there, ", ")))
	}
	return err
}

// Remove removes the lab with that prefix, left by an earlier demo, and ends its relay. It is an
// error if there is none, or if foreign processes run in it; then nothing has changed.
func Remove(prefix string) error {
	p := places{prefix}
	if _, err := os.Lstat(p.runDir()); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no lab called %s is there (no %s)", p.prefix, p.runDir())
	} else if err != nil {
		return err
	}
	if err := stopKeptRelay(p); err != nil {
		return err
	}
	return p.remove()
}

// stopKeptRelay ends the relay of a lab. It refuses, and ends nothing, while foreign processes run
// in the lab: they would keep the namespaces alive.
func stopKeptRelay(p places) error {
	pid, err := listenerOf(p.socket())
	if err != nil {
		return err
	}
	var relay *process
	if pid != 0 { // open it before checking, so that the PID cannot be reused
		if relay, err = openProcess(pid); err != nil {
			return err
		}
		defer relay.close()
	}
	inside, err := processesIn(p)
	if err != nil {
		return err
	}
	var errs []error
	for _, other := range inside {
		if other.pid != pid {
			errs = append(errs, fmt.Errorf("process %d (%s) runs in %s: end it first", other.pid, other.name, other.namespace))
		}
	}
	switch {
	case len(errs) > 0:
		return errors.Join(errs...)
	case relay == nil:
		return nil
	case len(inside) == 0 && !relay.ended():
		return fmt.Errorf("process %d serves %s, but not from within the lab: end it first", pid, p.socket())
	}
	return relay.stop(stopPatience)
}

// clean removes everything that the demo made.
func (d *demonstration) clean() error {
	var errs []error
	if d.relay != nil {
		errs = append(errs, d.relay.stop())
	}
	for _, h := range d.hosts {
		errs = append(errs, h.Close())
	}
	return errors.Join(append(errs, d.places.remove())...)
}

// release closes this process's handles of the lab, which stays.
func (d *demonstration) release() error {
	d.relay.release()
	var errs []error
	for _, h := range d.hosts {
		errs = append(errs, h.Release())
	}
	return errors.Join(errs...)
}

// build makes the hosts and their cables:
//
//	source eth0 ---- eth0 relay eth1 ---- eth0 sink1
//	                            eth2 ---- eth0 sink2
//	                            eth3 ---- eth0 sink3
func (d *demonstration) build() error {
	for _, name := range labHosts() {
		h, err := lab.NewHost(d.places.namespace(name))
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%w: it takes root with the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN", err)
		}
		if err != nil {
			return err
		}
		d.hosts[name] = h
	}
	relay := d.hosts[relayHost]
	if err := connect(
		lab.End{Host: d.hosts[sourceHost], Name: "eth0", Addrs: []string{"10.0.0.5/24", "10.0.0.6/24"}},
		lab.End{Host: relay, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}); err != nil {
		return err
	}
	for i, name := range sinkHosts() {
		sink := d.hosts[name]
		if err := connect(
			lab.End{Host: relay, Name: fmt.Sprintf("eth%d", i+1), Addrs: []string{fmt.Sprintf("10.0.%d.1/24", i+1)}},
			lab.End{Host: sink, Name: "eth0", Addrs: []string{fmt.Sprintf("10.0.%d.2/24", i+1)}}); err != nil {
			return err
		}
		// Streams that keep their source come from addresses to which the sink has no other route:
		// its reverse path check (rp_filter) may require one.
		if err := sink.AddRoute("0.0.0.0/0", "eth0"); err != nil {
			return err
		}
	}
	return nil
}

func connect(a, b lab.End) error {
	err := lab.Connect(a, b, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: the kernel needs veth devices (CONFIG_VETH)", err)
	}
	return err
}

// writeRules writes the streams' rules to the relay's file.
func (d *demonstration) writeRules() error {
	list := make([]rules.Rule, 0, len(d.streams))
	for _, s := range d.streams {
		rule, err := control.ToRule(s.rule)
		if err != nil {
			return err
		}
		list = append(list, rule)
	}
	data, err := rules.FormatFile(list)
	if err != nil {
		return err
	}
	return os.WriteFile(d.places.rulesFile(), data, 0o644)
}
