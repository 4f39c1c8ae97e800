package forward

import (
	"sync/atomic"

	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// Accounts is where a path counts what becomes of packets; *loader.Loader is one, whose
// account outlives the process.
type Accounts interface {
	// OpenCounters opens the counters of a rule. Update and the methods that call it
	// call it.
	OpenCounters(rule flow.Flow) *account.RuleCounters
	Account() *account.Account
}

// ownAccounts ends with its path.
type ownAccounts struct{ account *account.Account }

func (o ownAccounts) OpenCounters(rule flow.Flow) *account.RuleCounters {
	return o.account.OpenRule(len(rule.Out))
}

func (o ownAccounts) Account() *account.Account { return o.account }

// accountsOr is a, or an account of its own for nil.
func accountsOr(a Accounts) Accounts {
	if a == nil {
		return ownAccounts{account.NewInMemory()}
	}
	return a
}

// reasons is the number of drop reasons.
const reasons = int(loader.Internal) + 1

// counter has one writer, and readers at any time. Each of its two numbers is
// exact; between them a reader may see half of an addition.
type counter struct {
	packets, bytes atomic.Uint64
}

// add needs no locked instruction for the sum: it has one writer.
func (c *counter) add(packets, bytes uint64) {
	c.packets.Store(c.packets.Load() + packets)
	c.bytes.Store(c.bytes.Load() + bytes)
}

func (c *counter) addTo(sum *loader.Counter) {
	sum.Packets += c.packets.Load()
	sum.Bytes += c.bytes.Load()
}

// counters are one worker's for one rule or output. The cells are taken with the first
// packet that they count: of the reasons, few occur.
type counters struct {
	from   *account.Counters
	writer account.Writer
	all    *account.Cell // what matched, or was sent
	drops  [reasons]*account.Cell
	notes  [notes]*account.Cell
	pace   packet.GuardPace // of a rule
}

// notes is the number of notes.
const notes = int(loader.Echo) + 1

// drop counts a drop.
func (c *counters) drop(reason loader.Reason, packets, bytes uint64) {
	cell := c.drops[reason]
	if cell == nil {
		cell = c.from.Cell(c.writer, account.FirstDrop+account.Kind(reason))
		c.drops[reason] = cell
	}
	cell.Add(packets, bytes)
}

// note counts what is no drop.
func (c *counters) note(note loader.Note, packets, bytes uint64) {
	cell := c.notes[note]
	if cell == nil {
		cell = c.from.Cell(c.writer, account.FirstNote+account.Kind(note))
		c.notes[note] = cell
	}
	cell.Add(packets, bytes)
}

// perWorker are the counters of each worker, made with the first packet that it counts:
// of the workers that there could be, few serve a rule. Each worker uses its own alone.
type perWorker struct {
	from    *account.Counters
	workers []*counters
}

func newPerWorker(from *account.Counters, workers int) *perWorker {
	return &perWorker{from, make([]*counters, workers)}
}

// of returns the counters of an engine's worker, to that engine alone; kind is what they
// count first of all.
func (p *perWorker) of(e *Engine, kind account.Kind) *counters {
	if c := p.workers[e.worker]; c != nil {
		return c
	}
	c := &counters{from: p.from, writer: e.writer, all: p.from.Cell(e.writer, kind)}
	p.workers[e.worker] = c
	return c
}

// sentAndDropped reads what an output, or a rule, has counted.
func sentAndDropped(from *account.Counters) (sums map[account.Kind]account.Sum, drops map[loader.Reason]loader.Counter) {
	sums, drops = from.Sums(), map[loader.Reason]loader.Counter{}
	for kind, sum := range sums {
		if kind >= account.FirstDrop && sum.Packets > 0 {
			drops[loader.Reason(kind-account.FirstDrop)] = loader.Counter{Packets: sum.Packets, Bytes: sum.Bytes}
		}
	}
	return sums, drops
}
