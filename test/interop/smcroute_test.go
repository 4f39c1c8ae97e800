//go:build interop

package interop

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
	"xdpcast/pkg/packet"
)

// smcScenario is an smcroute router between two sources and two sinks, and what is sent through it.
// The scenarios repeat those of smcroute's own tests.
//
//	source 0 eth0 - in0 router out0 - eth0 sink 0
//	source 1 eth0 - in1        out1 - eth0 sink 1
type smcScenario struct {
	name  string
	conf  string
	flags []string // for smcrouted
	steps [][]smcFrame
	ends  string // entry of the kernel that must end
	taken int    // entries forwarded in XDP at the end
}

// smcFrame is what a source sends.
type smcFrame struct {
	from          int
	tag           uint16 // IEEE 802.1Q; 0: none
	source, group string
	ttl           uint8
	steady        bool // sent every 50 ms to the end of the scenario; false: once
}

const (
	smcMarker4, smcMarker6 = "239.255.0.%d", "ff0e::ffff:%d"
	smcSource4, smcSource6 = "10.9.%d.1", "fd09::%d"

	// The payload, for what is sent once and for the rest.
	smcOnce, smcSteady = 0xa5, 0x5a
)

func smcScenarios() []smcScenario {
	all := "phyint in0 enable\nphyint in1 enable\nphyint out0 enable\nphyint out1 enable\n"
	f := func(from int, source, group string) smcFrame {
		return smcFrame{from: from, source: source, group: group, ttl: 16}
	}
	twice := func(frames ...smcFrame) [][]smcFrame {
		return [][]smcFrame{frames, slices.Concat(frames, frames, frames)}
	}
	multi := []smcFrame{}
	conf := all
	for group := range 3 {
		for from := range 2 {
			conf += fmt.Sprintf("mroute from in%d group 239.1.%d.1 to out0 out1\n", from, group)
			for host := range 2 {
				multi = append(multi, f(from, fmt.Sprintf("10.%d.0.%d", from, 5+host), fmt.Sprintf("239.1.%d.1", group)))
			}
		}
	}
	low := f(0, "10.0.0.5", "239.1.1.1")
	low.ttl = 1
	tagged := f(0, "10.0.0.5", "239.1.1.1")
	tagged.tag = 10 // of a VLAN without an interface on the router
	priority := tagged
	priority.tag = 5 << 13 // priority tag: the kernel removes it
	steady, idle := f(0, "10.0.0.5", "239.1.1.1"), f(0, "10.0.0.6", "239.1.1.1")
	steady.steady = true
	return []smcScenario{
		{name: "adv", taken: 5, conf: all + "mroute from in0 group 239.1.1.0/24 to out0\nmroute from in1 group 239.1.1.0/24 to out1\n" +
			"mroute from in0 source 10.0.0.9 group 239.1.1.1 to out0 out1\n",
			steps: twice(f(0, "10.0.0.5", "239.1.1.1"), f(0, "10.0.0.5", "239.1.1.2"), f(0, "10.0.0.9", "239.1.1.1"),
				f(1, "10.1.0.5", "239.1.1.1"), f(1, "10.1.0.5", "239.1.1.3"), f(1, "10.1.0.5", "239.7.7.7"), low)},
		{name: "multi", taken: 12, conf: conf, steps: twice(multi...)},
		{name: "vlan", taken: 1, conf: all + "mroute from in0 source 10.0.0.5 group 239.1.1.1 to out0 out1\n",
			steps: twice(f(0, "10.0.0.5", "239.1.1.1"), tagged, priority)},
		{name: "wrongvif", taken: 1, conf: all + "mroute from in0 source 10.0.0.5 group 239.1.1.1 to out0 out1\n",
			steps: twice(f(0, "10.0.0.5", "239.1.1.1"), f(1, "10.0.0.5", "239.1.1.1"))},
		{name: "expire", taken: 1, flags: []string{"-c", "2"}, conf: all + "mroute from in0 group 239.1.1.0/24 to out0\n",
			steps: [][]smcFrame{{idle}, {steady}}, ends: "10.0.0.6,239.1.1.1 in0"},
		{name: "ipv6", taken: 2, conf: all + "mroute from in0 source fd00::5 group ff0e::1:1 to out0 out1\nmroute from in1 source fd01::5 group ff0e::1:2 to out1\n",
			steps: twice(f(0, "fd00::5", "ff0e::1:1"), f(1, "fd01::5", "ff0e::1:2"), f(1, "fd00::5", "ff0e::1:1"), f(0, "fd00::6", "ff0e::1:1"))},
		{name: "poison", taken: 1, conf: all + "mroute from in0 group 239.1.1.1 to out0\n",
			steps: [][]smcFrame{{f(1, "10.0.0.5", "239.1.1.1")}, {f(0, "10.0.0.5", "239.1.1.1"), f(0, "10.0.0.7", "239.1.1.1")},
				{f(0, "10.0.0.5", "239.1.1.1"), f(0, "10.0.0.7", "239.1.1.1"), f(1, "10.0.0.7", "239.1.1.1")}}},
	}
}

// smcResult is the outcome of a scenario.
type smcResult struct {
	frames [2][][]byte // at each sink, sorted, without MAC addresses
	routes []string    // of the kernel at the end
}

// run plays the scenario, with the routes mirrored or without.
func (s *smcScenario) run(ctx context.Context, t *testing.T, mirrored bool) (result smcResult) {
	router := labtest.Host(t, "smc")
	var sources, sinks [2]*labtest.Tap
	for i := range 2 {
		source, sink := labtest.Host(t, "src"), labtest.Host(t, "snk")
		labtest.Connect(t, lab.End{Host: source, Name: "eth0"}, lab.End{Host: router, Name: fmt.Sprint("in", i), Addrs: []string{fmt.Sprintf("10.%d.0.1/24", i), fmt.Sprintf("fd0%d::1/64", i)}})
		labtest.Connect(t, lab.End{Host: router, Name: fmt.Sprint("out", i), Addrs: []string{fmt.Sprintf("10.2.%d.1/24", i), fmt.Sprintf("fd02:%d::1/64", i)}}, lab.End{Host: sink, Name: "eth0"})
		sources[i], sinks[i] = labtest.NewTap(t, source, "eth0"), labtest.NewTap(t, sink, "eth0")
	}
	in(ctx, t, router, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
		"net.ipv4.conf.in0.rp_filter=0", "net.ipv4.conf.in1.rp_filter=0")
	is4 := netip.MustParseAddr(s.steps[0][0].group).Is4()
	marker, from := smcMarker4, smcSource4
	if !is4 {
		marker, from = smcMarker6, smcSource6
	}
	conf := s.conf
	for i := range 2 {
		conf += fmt.Sprintf("mroute from in%d source "+from+" group "+marker+" to out0 out1\n", i, i, i)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "smcroute.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "smcroute.sock")
	daemon := start(ctx, t, router, "smcrouted", slices.Concat([]string{"-n", "-N", "-f", file, "-u", socket, "-P", filepath.Join(dir, "pid")}, s.flags)...)
	t.Cleanup(func() {
		if t.Failed() {
			daemon.stop(syscall.SIGTERM)
			t.Logf("smcrouted: %s", daemon.stderr.String())
		}
	})
	// The markers appear among the kernel's routes once the whole file is loaded.
	labtest.Eventually(t, "smcrouted has its routes in", func() bool { return len(kernelRoutes(ctx, t, router, is4, true)) >= 2 })
	var r *relay
	if mirrored {
		leave := "239.255.0.0/16"
		if !is4 {
			leave = "ff0e::ffff:0/112"
		}
		r, _ = startDaemon(ctx, t, router, fmt.Sprintf("rules: []\nmroute: {leave: %q}\n", leave), 0)
	}
	frame := func(f smcFrame, number uint32) []byte {
		group := netip.MustParseAddr(f.group)
		p := packet.Frame{
			SrcMAC: [6]byte{2, 0, 0, 0, 0, 1}, DstMAC: packet.MulticastMAC(group), Src: netip.MustParseAddr(f.source), Dst: group,
			SrcPort: 4000, DstPort: 5000, TTL: f.ttl, Payload: binary.BigEndian.AppendUint32(bytes.Repeat([]byte{smcOnce}, 40), number),
		}
		if f.steady {
			p.Payload = binary.BigEndian.AppendUint32(bytes.Repeat([]byte{smcSteady}, 40), number)
		}
		if f.tag != 0 {
			p.VLANs = []uint16{f.tag}
		}
		return p.Build()
	}
	steady, number := steadySource{}, uint32(0)
	defer steady.stop()
	once := func(f smcFrame) {
		number++
		sources[f.from].Send(frame(f, number))
	}
	for _, step := range s.steps {
		for _, f := range step {
			if f.steady {
				steady.start(func(number uint32) { sources[f.from].Send(frame(f, number)) })
			} else {
				once(f)
			}
		}
		for i := range 2 {
			once(smcFrame{from: i, source: fmt.Sprintf(from, i), group: fmt.Sprintf(marker, i), ttl: 16})
		}
		for i, sink := range sinks {
			// The kernel queues packets until smcrouted has answered.
			resolved := func() bool {
				return !slices.ContainsFunc(kernelRoutes(ctx, t, router, is4, false), func(r string) bool { return strings.HasSuffix(r, " unresolved") })
			}
			result.frames[i] = append(result.frames[i], untilQuiet(t, sink, fmt.Sprintf("sink %d", i), marker, resolved)...)
		}
		if mirrored {
			labtest.Eventually(t, "the routes are mirrored", func() bool {
				status, err := control.NewClient(r.socket).Status(ctx)
				return err == nil && status.Mroutes != nil && status.Mroutes.Entries == len(kernelRoutes(ctx, t, router, is4, true))
			})
		}
	}
	if s.ends != "" {
		labtest.Eventually(t, s.ends+" ends, and smcrouted has looked several times at what goes on", func() bool {
			return !slices.Contains(kernelRoutes(ctx, t, router, is4, false), s.ends) && steady.goesOn() > 7*time.Second
		})
	}
	result.routes = kernelRoutes(ctx, t, router, is4, false)
	for i := range result.frames {
		slices.SortFunc(result.frames[i], bytes.Compare)
	}
	if mirrored {
		labtest.Eventually(t, fmt.Sprintf("%d routes are forwarded in XDP", s.taken), func() bool {
			status, err := control.NewClient(r.socket).Status(ctx)
			return err == nil && status.Mroutes.Accelerated == s.taken
		})
	}
	return result
}

// steadySource sends until it is stopped, so that what needs its packets lasts however long a look takes.
type steadySource struct {
	began time.Time
	end   context.CancelFunc
	done  sync.WaitGroup
}

// start starts it once.
func (s *steadySource) start(send func(number uint32)) {
	var ctx context.Context
	ctx, s.end = context.WithCancel(context.Background())
	s.began = time.Now()
	s.done.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for number := uint32(0); ctx.Err() == nil; number++ {
			send(number)
			<-tick.C
		}
	})
}

func (s *steadySource) goesOn() time.Duration { return time.Since(s.began) }

func (s *steadySource) stop() {
	if s.end != nil {
		s.end()
	}
	s.done.Wait()
}

// untilQuiet returns what a sink receives until both markers have arrived, the kernel holds nothing back, and nothing
// more arrives, without MAC addresses, markers and the steady source.
func untilQuiet(t *testing.T, sink *labtest.Tap, where, marker string, resolved func() bool) (frames [][]byte) {
	t.Helper()
	markers := 0
	for wait := labtest.Timeout; ; {
		f := sink.Receive(wait, func(f []byte) bool { return bytes.Contains(f, bytes.Repeat([]byte{smcOnce}, 40)) })
		switch {
		case f == nil && markers < 2:
			t.Fatalf("%s: %d of 2 markers", where, markers)
		case f == nil:
			return frames
		}
		is := false
		for i := range 2 {
			is = is || bytes.Contains(f, netip.MustParseAddr(fmt.Sprintf(marker, i)).AsSlice())
		}
		if is {
			if markers++; markers == 2 {
				labtest.Eventually(t, where+": the kernel has forwarded what it queued", resolved)
				wait = 300 * time.Millisecond
			}
			continue
		}
		frames = append(frames, f[12:])
	}
}

// hexLines formats frames, one per line.
func hexLines(frames [][]byte) (text string) {
	for _, f := range frames {
		text += fmt.Sprintf("%x\n", f)
	}
	return text
}

var kernelRoute = regexp.MustCompile(`\(([^)]*)\)\s+Iif: (\S+)`)

// kernelRoutes are the kernel's entries, as printed by ip.
func kernelRoutes(ctx context.Context, t *testing.T, h *lab.Host, is4, resolved bool) (all []string) {
	t.Helper()
	family := "-6"
	if is4 {
		family = "-4"
	}
	for _, m := range kernelRoute.FindAllStringSubmatch(in(ctx, t, h, "ip", family, "mroute", "show"), -1) {
		if !resolved || m[2] != "unresolved" {
			all = append(all, m[1]+" "+m[2])
		}
	}
	slices.Sort(all)
	return all
}

// TestSmcrouteScenarios: the scenarios of smcroute's own tests have the same outcome with mirrored
// routes as with the kernel alone, and leave the same routes in the kernel.
func TestSmcrouteScenarios(t *testing.T) {
	ctx := labtest.Context(t)
	t.Run("scenario", func(t *testing.T) {
		for _, s := range smcScenarios() {
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				kernel, mirrored := s.run(ctx, t, false), s.run(ctx, t, true)
				if !slices.Equal(kernel.routes, mirrored.routes) {
					t.Errorf("the kernel has the routes %q, alone %q", mirrored.routes, kernel.routes)
				}
				got := 0
				for i := range kernel.frames {
					got += len(kernel.frames[i])
					if !slices.EqualFunc(kernel.frames[i], mirrored.frames[i], bytes.Equal) {
						t.Errorf("sink %d:\n%s\nof the kernel alone:\n%s", i, hexLines(mirrored.frames[i]), hexLines(kernel.frames[i]))
					}
				}
				if got == 0 {
					t.Error("nothing came")
				}
			})
		}
	})
}
