package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/live"
)

// patience bounds every wait; no wait reaches it while all is well.
const patience = 2 * time.Minute

// stage is the network and its daemon.
type stage struct {
	opts                options
	source, relay, sink *lab.Host
	dir, runDir, pinDir string
	sender              *live.Source
	witness             *live.Witness
	trials              uint32 // streams so far
	client              *control.Client
	pid                 int       // of the daemon
	holder              *exec.Cmd // runs the daemon, and keeps its memberships
	log                 output
}

// output is what the holder and its daemons write.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func newStage(o options) (_ *stage, err error) {
	s := &stage{opts: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	for name, host := range map[string]**lab.Host{"source": &s.source, "relay": &s.relay, "sink": &s.sink} {
		if *host, err = lab.NewHost(lab.UniqueName(o.name + "-" + name)); err != nil {
			return nil, err
		}
	}
	for _, pair := range [][2]lab.End{
		{{Host: s.relay, Name: "in0", Addrs: []string{"10.1.0.1/24"}}, {Host: s.source, Name: "src0", Addrs: []string{"10.1.0.2/24"}}},
		{{Host: s.relay, Name: "out0", Addrs: []string{"10.2.0.1/24"}}, {Host: s.sink, Name: "sink0", Addrs: []string{"10.2.0.2/24"}}},
		{{Host: s.relay, Name: "other0", Addrs: []string{"10.3.0.1/24"}}, {Host: s.sink, Name: "other0", Addrs: []string{"10.3.0.2/24"}}},
	} {
		if err := lab.Connect(pair[0], pair[1], 0); err != nil {
			return nil, err
		}
	}
	if s.dir, err = os.MkdirTemp("/tmp", o.name+"-"); err != nil {
		return nil, err
	}
	s.runDir, s.pinDir = filepath.Join(s.dir, "run"), filepath.Join(s.dir, "bpf", "xdpcast")
	if err := os.Mkdir(s.runDir, 0o755); err != nil {
		return nil, err
	}
	if err := s.install(s.opts.program); err != nil {
		return nil, err
	}
	// Its own file system, so that it can be filled.
	if err := unix.Mount("tmpfs", s.runDir, "tmpfs", 0, "size=4m,mode=755"); err != nil {
		return nil, fmt.Errorf("mount %s: %w", s.runDir, err)
	}
	if err := s.openTraffic(); err != nil {
		return nil, err
	}
	s.client = control.NewClient(s.socket())
	if err := s.writeRules(0); err != nil {
		return nil, err
	}
	return s, s.start()
}

func (s *stage) socket() string { return filepath.Join(s.runDir, "s") }

// binary is what the relay runs.
func (s *stage) binary() string { return filepath.Join(s.dir, "xdpcast") }

// install puts a copy of a program at that path by a rename, as package managers do.
func (s *stage) install(program string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	next := s.binary() + ".new"
	if err := os.WriteFile(next, data, 0o755); err != nil {
		return err
	}
	return os.Rename(next, s.binary())
}

// installOther installs the other build, and the first one again the next time.
func (s *stage) installOther() error {
	if s.opts.other != "" {
		s.opts.program, s.opts.other = s.opts.other, s.opts.program
	}
	return s.install(s.opts.program)
}

func (s *stage) env() []string {
	return append(os.Environ(), "XDPCAST_SOCKET="+s.socket(), "XDPCAST_PIN_DIR="+s.pinDir, "XDPCAST_RUN_DIR="+s.runDir, "XDPCAST_STATE_DIR="+filepath.Join(s.dir, "state"))
}

// writeRules writes the file: the stream's rule and a number of others.
func (s *stage) writeRules(others int) error {
	text := fmt.Sprintf("rules:\n  - {name: stream, in: '%v%%in0', out: ['%v%%out0'], path: %s}\n", streamIn, streamOut, s.opts.path)
	for i := range others {
		text += fmt.Sprintf("  - {name: other%d, in: 239.1.8.%d:5000%%in0, out: [239.2.8.%d:6000%%out0]}\n", i, i+1, i+1)
	}
	return os.WriteFile(filepath.Join(s.dir, "rules.yaml"), []byte(text), 0o644)
}

// start starts a holder with a daemon, and waits until the stream's rule is active.
func (s *stage) start() error {
	s.holder = exec.Command(s.binary(), "hold", "--", s.binary(), "run", "--worker-priority", s.opts.priority, "-c", filepath.Join(s.dir, "rules.yaml"))
	s.holder.Env, s.holder.Stdout, s.holder.Stderr = s.env(), &s.log, &s.log
	if err := s.relay.Start(s.holder); err != nil {
		return err
	}
	return s.settle()
}

// settle waits until the daemon answers and the stream's rule is active.
func (s *stage) settle() error { return s.settleAfter(0) }

// settleAfter does so for a daemon whose process is not the one given.
func (s *stage) settleAfter(before int) error {
	last := fmt.Errorf("process %d still answers", before)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		status, err := s.client.Status(context.Background())
		if err != nil {
			last = err
			continue
		}
		if status.PID == before {
			continue
		}
		rule, err := s.client.Rule(context.Background(), "stream")
		if err == nil && rule.State == control.StateActive {
			s.pid = status.PID
			return nil
		}
		if last = err; err == nil {
			last = fmt.Errorf("rule stream is %s (%s)", rule.State, rule.Reason)
		}
	}
	return fmt.Errorf("the daemon does not get ready: %w", last)
}

// end ends the daemon and its holder.
func (s *stage) end() error {
	if s.holder == nil {
		return nil
	}
	if err := s.holder.Process.Signal(os.Interrupt); err != nil {
		return err
	}
	err := s.holder.Wait()
	s.holder, s.pid = nil, 0
	if err != nil {
		return fmt.Errorf("the daemon: %w:\n%s", err, s.log.String())
	}
	return nil
}

func (s *stage) close() error {
	errs := []error{s.end()}
	if _, err := os.Stat(s.pinDir); err == nil && s.pinDir != "" {
		errs = append(errs, s.cli("unload", "--all"))
	}
	for _, dir := range []string{filepath.Join(s.dir, "bpf"), s.runDir} {
		if s.dir != "" {
			errs = append(errs, ignore(ignore(unix.Unmount(dir, 0), unix.EINVAL), unix.ENOENT))
		}
	}
	if s.sender != nil {
		errs = append(errs, s.sender.Close())
	}
	if s.witness != nil {
		errs = append(errs, s.witness.Close())
	}
	for _, host := range []*lab.Host{s.source, s.relay, s.sink} {
		if host != nil {
			errs = append(errs, host.Close())
		}
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// holding is what the daemon's process holds.
type holding struct {
	descriptors, maps, programs, links int
	resident                           int // bytes
}

func (s *stage) holding() (h holding, err error) {
	dir := fmt.Sprintf("/proc/%d/", s.pid)
	descriptors, err := os.ReadDir(dir + "fdinfo")
	if err != nil {
		return h, err
	}
	h.descriptors = len(descriptors)
	for _, d := range descriptors {
		text, _ := os.ReadFile(dir + "fdinfo/" + d.Name()) // a descriptor closed in the meantime has none
		switch {                                           // a link's names its program, too
		case bytes.Contains(text, []byte("link_id:")):
			h.links++
		case bytes.Contains(text, []byte("map_id:")):
			h.maps++
		case bytes.Contains(text, []byte("prog_id:")):
			h.programs++
		}
	}
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return h, err
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kB, err := strconv.Atoi(strings.Fields(rest)[0])
	h.resident = kB << 10
	return h, err
}

// measure runs a disturbance while packets flow.
func (s *stage) measure(ctx context.Context, d disturbance) (r result, err error) {
	r.name = d.name
	if r.before, err = s.holding(); err != nil {
		return r, err
	}
	leaves, err := watchLeaves(s.source)
	if err != nil {
		return r, err
	}
	defer leaves.close()
	stream, err := s.startStream(s.opts.rate)
	if err != nil {
		return r, err
	}
	defer stream.close()
	for range s.opts.rounds {
		if err := sleep(ctx, s.long(max(s.opts.pause, d.apart))); err != nil {
			return r, err
		}
		if err := d.do(ctx, s); err != nil {
			if ctx.Err() == nil {
				err = errors.Join(err, errors.New(s.log.String()))
			}
			return r, err
		}
		if err := s.settle(); err != nil {
			return r, err
		}
	}
	if err := sleep(ctx, s.long(time.Second)); err != nil {
		return r, err
	}
	if err := stream.end(&r, patienceForRest); err != nil {
		return r, err
	}
	if r.leaves, err = leaves.count(); err != nil {
		return r, err
	}
	r.after, err = s.holding()
	return r, err
}
