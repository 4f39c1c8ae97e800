package doctor

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"xdpcast/internal/control"
	"xdpcast/pkg/loader"
)

// hostChecks are the checks of the host. fine is the text if run finds nothing.
var hostChecks = [...]struct {
	name, fine string
	run        func(*Host) []Finding
}{
	{"kernel", "the kernel has all that the relay uses", kernel},
	{"mitigations", "no mitigation makes indirect calls slow", mitigations},
	{"bpffs", "the pin directory is on a BPF file system", bpffs},
	{"pinned", "what is pinned can be read", pinned},
	{"daemon", "the daemon runs and has its rules in", daemon},
	{"namespace", "the daemon is in this network namespace", namespace},
	{"capabilities", "all capabilities are there", capabilities},
	{"descriptors", "enough file descriptors", descriptors},
	{"memlock", "memory for AF_XDP sockets may be locked", memlock},
	{"clock", "the time namespace shares the host's monotonic clock", clock},
	{"memberships", "all groups are joined", memberships},
	{"routes", "no multicast route is left to the kernel but those that are meant to be", routes},
	{"softnet", "no CPU drops packets between driver and stack", softnet},
	{"firewall", "no nftables rule keeps IGMP or MLD from the kernel", firewall},
	{"facts", "everything could be looked at", unread},
}

func kernel(h *Host) (found []Finding) {
	if h.Lacks != nil {
		return one(fault("install Linux 6.1 or newer", "%v", h.Lacks))
	}
	for _, c := range []struct {
		has         bool
		what, since string
	}{
		{h.Has.MultiBuffer, "native mode on interfaces whose MTU needs several buffers a frame", "5.18"},
		{h.Has.SocketMultiBuffer, "frames of several buffers on the path afxdp: they are dropped, reason multi_buffer", "6.6"},
		{h.Has.TCX, "keeping packets of the path fanout from the host's stack, which takes CPU time for them", "6.6"},
	} {
		if !c.has {
			found = append(found, warning("install Linux "+c.since+" or newer", "Linux %s cannot do: %s", h.Release, c.what))
		}
	}
	return found
}

// mitigations looks for retpolines: the packet path makes indirect calls for each copy.
func mitigations(h *Host) (found []Finding) {
	for _, name := range []string{"spectre_v2", "retbleed", "srso", "indirect_target_selection"} {
		state := h.Mitigations[name]
		lower, _, _ := strings.Cut(strings.ToLower(state), ";") // the rest is about other flaws
		slow := strings.Contains(lower, "retpoline")
		if name != "spectre_v2" {
			slow = strings.Contains(lower, "mitigation") && (strings.Contains(lower, "untrained") || strings.Contains(lower, "safe ret") || strings.Contains(lower, "aligned"))
		}
		if slow {
			found = append(found, warning(
				"on a host that runs no foreign code: add mitigations=off to the kernel's command line (GRUB_CMDLINE_LINUX of /etc/default/grub), then update-grub and reboot",
				"%s: %s. Indirect calls and returns are slow: retpolines cost about 16 ns a copy", name, state))
		}
	}
	return found
}

func bpffs(h *Host) (found []Finding) {
	switch {
	case !h.Mounted && h.Daemon != nil:
		return one(fault("stop xdpcast, mount -t bpf bpf /sys/fs/bpf, start xdpcast", "no BPF file system holds %s: what the daemon relays ends with it", h.PinDir))
	case !h.Mounted:
		return one(warning("mount -t bpf bpf /sys/fs/bpf", "no BPF file system is mounted for %s; xdpcast run mounts one over /sys/fs/bpf only", h.PinDir))
	case h.Private != "":
		return one(warning("run xdpcast by nsenter --net=FILE instead of ip netns exec", "%s", h.Private))
	}
	return nil
}

func pinned(h *Host) []Finding {
	if h.Pinned == nil {
		return nil
	}
	return one(fault("start xdpcast, which migrates or replaces it", "%v", h.Pinned))
}

func daemon(h *Host) (found []Finding) {
	d := h.Daemon
	switch {
	case d == nil && h.Rules > 0:
		return one(fault("systemctl start xdpcast", "no daemon runs: the kernel keeps relaying %s of the path kernel, but no group is joined, and the paths afxdp and fanout are down", plural(h.Rules, "rule")))
	case d == nil:
		return one(warning("systemctl start xdpcast", "no daemon runs, and no rule is in the kernel"))
	case !d.Ready:
		found = append(found, warning("journalctl -u xdpcast", "the daemon has not brought its rules in yet"))
	}
	if d.Failed > 0 {
		found = append(found, fault("xdpcast rule list", "%s failed", plural(d.Failed, "rule")))
	}
	pending := d.Pending
	if d.Mroutes != nil {
		pending -= d.Mroutes.Entries - d.Mroutes.Accelerated // see routes
	}
	if pending > 0 {
		found = append(found, warning("xdpcast rule list", "%s pending: REASON says what each waits for", plural(pending, "rule is", "rules are")))
	}
	for _, w := range d.Warnings {
		found = append(found, warning("xdpcast status", "the daemon warns: %s", w))
	}
	for _, w := range d.Workers {
		if w.State == control.StateFailed || w.State == control.WorkerMissing {
			found = append(found, warning("xdpcast status", "worker %d of the path %s on %s is %s: %s", w.Queue, w.Path, w.Interface, w.State, w.Cause))
		}
	}
	return found
}

// namespace: the interface checks apply to the namespace of this program.
func namespace(h *Host) []Finding {
	if !h.Process.Elsewhere {
		return nil
	}
	return one(fault(fmt.Sprintf("nsenter -t %d -n xdpcast doctor", h.Process.PID),
		"the daemon, process %d, is in another network namespace: no interface is checked, since those here are not the ones that it relays between", h.Process.PID))
}

func capabilities(h *Host) []Finding {
	missing, optional := loader.MissingCapabilities(h.Process.Capabilities)
	switch {
	case len(missing) > 0 && h.Daemon == nil:
		return one(fault("sudo xdpcast doctor", "this command lacks %s: without them it sees less, and xdpcast run would not start", strings.Join(missing, ", ")))
	case len(missing) > 0:
		return one(fault("systemctl edit xdpcast: AmbientCapabilities="+strings.Join(missing, " "), "process %d lacks %s", h.Process.PID, strings.Join(missing, ", ")))
	case len(optional) > 0:
		return one(warning("systemctl edit xdpcast: AmbientCapabilities="+strings.Join(optional, " "), "process %d lacks %s: the paths afxdp and fanout do not work", h.Process.PID, strings.Join(optional, ", ")))
	}
	return nil
}

// descriptors warns before they run out: each 20 groups take a socket.
func descriptors(h *Host) []Finding {
	p := h.Process
	if p.Limit == 0 || p.Files*10 < p.Limit*8 {
		return nil
	}
	text := fmt.Sprintf("process %d has %d of %d file descriptors open; 20 groups take one", p.PID, p.Files, p.Limit)
	cure := fmt.Sprintf("systemctl edit xdpcast: LimitNOFILE=%d, then systemctl restart xdpcast", nextPower(4*p.Limit))
	if p.Files*100 >= p.Limit*97 {
		return one(fault(cure, "%s: joins fail", text))
	}
	return one(warning(cure, "%s", text))
}

func nextPower(n int) int { return 1 << bits.Len(uint(n-1)) }

// memlock checks the limit that the memory of AF_XDP sockets is charged to (xdp_umem_account_pages
// of net/xdp/xdp_umem.c): 8192 frames of 2 kB for each queue.
func memlock(h *Host) []Finding {
	const umem = 8192 * 2048
	p := h.Process
	if p.Capabilities&(1<<unix.CAP_IPC_LOCK) != 0 || p.MemLock == 0 || p.MemLock >= 4*umem {
		return nil
	}
	return one(warning("systemctl edit xdpcast: LimitMEMLOCK=infinity, then systemctl restart xdpcast",
		"process %d may lock %d kB of memory and lacks CAP_IPC_LOCK: each queue of the path afxdp takes %d kB", p.PID, p.MemLock>>10, umem>>10))
}

func clock(h *Host) []Finding {
	if h.Process.ClockOffset == 0 {
		return nil
	}
	return one(warning("run xdpcast outside the time namespace: nsenter -t 1 -T xdpcast run",
		"process %d is in a time namespace whose monotonic clock is off by %v: programs in the kernel read the host's, and every age that is shown, such as LAST, is wrong by that", h.Process.PID, h.Process.ClockOffset))
}

func memberships(h *Host) (found []Finding) {
	failed := map[string]int{}
	for _, g := range h.Groups {
		if g.State == control.GroupFailed || g.State == control.GroupRetrying {
			failed[g.Cause]++
		}
	}
	for _, cause := range sortedKeys(failed) {
		cure := "xdpcast group list"
		if strings.Contains(cause, "too many open files") || strings.Contains(cause, "file descriptors are kept") {
			cure = "systemctl edit xdpcast: LimitNOFILE=65536, then systemctl restart xdpcast"
		}
		found = append(found, fault(cure, "%s not joined: %s", plural(failed[cause], "group is", "groups are"), cause))
	}
	return found
}

// routes reports multicast routes that something on the host forces to be left to the kernel.
func routes(h *Host) (found []Finding) {
	if h.Daemon == nil || h.Daemon.Mroutes == nil {
		return nil
	}
	m := h.Daemon.Mroutes
	for _, l := range m.Left {
		if l.Expected {
			continue
		}
		cure := "xdpcast rule show " + l.First
		if strings.HasPrefix(l.Reason, "a program on this host") {
			cure = "nothing, if the program is to receive; else --mroute-joined take, or joined: take of the file"
		}
		found = append(found, warning(cure, "%d of %s left to the kernel, the first %s: %s", l.Entries, plural(m.Entries, "multicast route is", "multicast routes are"), l.First, l.Reason))
	}
	return found
}

func softnet(h *Host) (found []Finding) {
	before, now := h.Softnet[0], h.Softnet[1]
	backlog := fmt.Sprintf("sysctl -w net.core.netdev_max_backlog=%d", max(4*h.Backlog, 4000))
	budget := fmt.Sprintf("sysctl -w net.core.netdev_budget=%d net.core.netdev_budget_usecs=8000", max(2*h.Budget, 600))
	switch {
	case now.Dropped > before.Dropped:
		found = append(found, fault(backlog, "CPUs dropped %d packets in %v, since their backlog of %d was full: generic mode, RPS and veth queue there", now.Dropped-before.Dropped, h.Apart, h.Backlog))
	case now.Dropped > 0:
		found = append(found, warning(backlog, "CPUs have dropped %d packets since the start of the host, since their backlog was full; none in the last %v", now.Dropped, h.Apart))
	}
	if now.Squeezed > before.Squeezed {
		found = append(found, warning(budget, "in %v, %d rounds of receiving ended before the rings were empty: more packets come than the CPUs take in", h.Apart, now.Squeezed-before.Squeezed))
	}
	return found
}

func unread(h *Host) (found []Finding) {
	for _, line := range h.Unread {
		found = append(found, warning("sudo xdpcast doctor", "not looked at: %s", line))
	}
	return found
}

// plural is "1 rule", "2 rules"; with two forms, "1 rule is", "2 rules are".
func plural(n int, forms ...string) string {
	form := forms[0]
	switch {
	case n == 1:
	case len(forms) > 1:
		form = forms[1]
	default:
		form += "s"
	}
	return fmt.Sprintf("%d %s", n, form)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
