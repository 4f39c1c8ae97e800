package loader

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"

	"xdpcast/bpf"
	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
)

// minAccount is the minimum number of cells of the map user_stats, and the page size in cells of
// which their number is a multiple.
const (
	minAccount  = 4096
	accountPage = 128
)

// accountCells is the number of cells: those that every rule and output needs on one worker. Few
// rules are on user-space paths, and those have several workers.
func accountCells(maxRules, maxOutputs uint32) uint32 {
	n := max(maxRules+maxOutputs, minAccount)
	return (n + accountPage - 1) / accountPage * accountPage
}

// openAccount opens the account in the map user_stats, unless that was done before this Loader was opened.
func (l *Loader) openAccount() (err error) {
	if e := l.opts.Early; e != nil {
		if l.account, err = e.take(l.maps.UserStats); l.account != nil || err != nil {
			return err
		}
	}
	open := account.New
	if l.shared {
		open = account.Join
	}
	l.account, err = mapAccount(l.maps.UserStats, open)
	return err
}

// mapAccount maps the map user_stats into memory, as far as it is needed, and opens the account in it.
func mapAccount(m *ebpf.Map, open func(account.Memory) (*account.Account, error)) (*account.Account, error) {
	memory, err := piecesOf(m)
	if err != nil {
		return nil, fmt.Errorf("map user_stats: %w", err)
	}
	a, err := open(memory)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map user_stats: %w", err), memory.Close())
	}
	return a, nil
}

// readAccount copies the map user_stats.
func readAccount(m *ebpf.Map) (*account.Account, error) {
	cells, err := readArray[bpf.RelayUserCounter](m, int(m.MaxEntries()))
	if err != nil {
		return nil, fmt.Errorf("read map user_stats: %w", err)
	}
	a, err := account.New(account.Bytes(bytesOf(cells)))
	if err != nil {
		return nil, fmt.Errorf("map user_stats: %w", err)
	}
	return a, nil
}

// Account holds the counters of the user-space paths. It lives until the Loader is closed and no
// counters are open any more.
func (l *Loader) Account() *account.Account { return l.account }

// openCounters are a rule's counters opened by a path.
type openCounters struct {
	rule     flow.Flow
	counters *account.RuleCounters
}

// OpenCounters opens the counters of a rule for a path: those of the current rule if it continues;
// otherwise they become the rule's when Sync publishes it. The caller must Close them.
func (l *Loader) OpenCounters(rule flow.Flow) *account.RuleCounters {
	rule = rule.Normalized()
	c := l.account.OpenRule(len(rule.Out))
	if e := l.rules[rule.Name]; e != nil && rule.Continues(*e.rule) {
		c.Bind(e.id, e.firstStats)
	}
	others := slices.DeleteFunc(l.counters[rule.Name], func(o openCounters) bool { return o.counters.Closed() })
	l.counters[rule.Name] = append(others, openCounters{rule, c})
	return c
}

// bindCounters assigns a new rule's ids to its open counters.
func (s *transaction) bindCounters(e *entry) {
	open := slices.DeleteFunc(s.counters[e.rule.Name], func(o openCounters) bool { return o.counters.Closed() })
	if len(open) == 0 {
		delete(s.counters, e.rule.Name)
		return
	}
	s.counters[e.rule.Name] = open
	for _, o := range open {
		if o.rule.Continues(*e.rule) && !o.counters.Rule.Bound() {
			o.counters.Bind(e.id, e.firstStats)
			s.onFailure(func() error { o.counters.Loosen(); return nil })
		}
	}
}

// retireAccount frees a rule's ids.
func (l *Loader) retireAccount(e *entry) {
	l.account.Retire(account.Target{Scope: account.Rule, ID: e.id})
	for i := range e.rule.Out {
		l.account.Retire(account.Target{Scope: account.Output, ID: e.firstStats + uint32(i)})
	}
	l.lost.forget(e)
}

// adoptAccount drops an earlier process's counts of removed rules and interfaces.
func (l *Loader) adoptAccount(byID []*entry, usedStats []bool) {
	l.account.RetireOthers(func(t account.Target) bool {
		switch t.Scope {
		case account.Rule:
			return int(t.ID) < len(byID) && byID[t.ID] != nil
		case account.Output:
			return int(t.ID) < len(usedStats) && usedStats[t.ID]
		}
		_, err := net.InterfaceByIndex(int(t.ID))
		return err == nil
	})
}

// accountWarnings warns about counts that may be lost.
func (l *Loader) accountWarnings() []string {
	if l.account == nil || !l.account.Full() {
		return nil
	}
	return []string{fmt.Sprintf("the map user_stats has no room for all counters of the paths afxdp and fanout: some are lost when the daemon ends (it has %d cells; --max-rules and --max-outputs size it)", l.maps.UserStats.MaxEntries())}
}

// bytesOf are the bytes of values.
func bytesOf[V any](values []V) []byte {
	var one V
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(values))), len(values)*int(unsafe.Sizeof(one)))
}
