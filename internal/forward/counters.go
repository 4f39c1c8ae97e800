package forward

import (
	"sync/atomic"

	"xdpcast/internal/account"
	"xdpcast/pkg/flow"
	"xdpcast/pkg/loader"
	"xdpcast/pkg/packet"
)

// Accounts is where a path counts packets; *loader.Loader is one, whose account outlives
// the process.
type Accounts interface {
	// OpenCounters opens the counters of a rule. It is called by Update and the methods
	// that call Update.
	OpenCounters(rule flow.Flow) *account.RuleCounters
	Account() *account.Account
}

// ownAccounts lives as long as its path.
type ownAccounts struct{ account *account.Account }

func (o ownAccounts) OpenCounters(rule flow.Flow) *account.RuleCounters {
	return o.account.OpenRule(len(rule.Out))
}

func (o ownAccounts) Account() *account.Account { return o.account }

// accountsOr returns a, or new accounts in memory if a is nil.
func accountsOr(a Accounts) Accounts {
	if a == nil {
		return ownAccounts{account.NewInMemory()}
	}
	return a
}

// reasons is the number of drop reasons.
const reasons = int(loader.Internal) + 1

// counter has one writer and any number of concurrent readers. Each of its two numbers
// is exact, but a reader may see one without the other.
type counter struct {
	packets, bytes atomic.Uint64
}

// add needs no locked instruction, since there is one writer.
func (c *counter) add(packets, bytes uint64) {
	c.packets.Store(c.packets.Load() + packets)
	c.bytes.Store(c.bytes.Load() + bytes)
}

func (c *counter) addTo(sum *loader.Counter) {
	sum.Packets += c.packets.Load()
	sum.Bytes += c.bytes.Load()
}

// counters are one worker's for one rule or output. Cells are allocated with the first
// packet that they count, since few of the reasons occur.
type counters struct {
	from   *account.Counters
	writer account.Writer
	all    *account.Cell // matched or sent packets
	drops  [reasons]*account.Cell
	notes  [notes]*account.Cell
	pace   packet.GuardPace // of a rule

	// Packets of the current batch that all lacks: see Engine.match.
	packets, bytes uint64
	seen           int64
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

// note counts an event that is not a drop.
func (c *counters) note(note loader.Note, packets, bytes uint64) {
	cell := c.notes[note]
	if cell == nil {
		cell = c.from.Cell(c.writer, account.FirstNote+account.Kind(note))
		c.notes[note] = cell
	}
	cell.Add(packets, bytes)
}

// perWorker holds the counters of each worker, allocated with the first packet that it
// counts, since few of the possible workers serve a rule. Each worker uses only its own.
type perWorker struct {
	from    *account.Counters
	workers []*counters
}

func newPerWorker(from *account.Counters, workers int) *perWorker {
	return &perWorker{from, make([]*counters, workers)}
}

// of returns the counters of an engine's worker; only that engine may call it. kind is the
// kind of counters.all.
func (p *perWorker) of(e *Engine, kind account.Kind) *counters {
	if c := p.workers[e.worker]; c != nil {
		return c
	}
	c := &counters{from: p.from, writer: e.writer, all: p.from.Cell(e.writer, kind)}
	p.workers[e.worker] = c
	return c
}

// sentAndDropped reads the counters of an output or a rule.
func sentAndDropped(from *account.Counters) (sums map[account.Kind]account.Sum, drops map[loader.Reason]loader.Counter) {
	sums, drops = from.Sums(), map[loader.Reason]loader.Counter{}
	for kind, sum := range sums {
		if kind >= account.FirstDrop && sum.Packets > 0 {
			drops[loader.Reason(kind-account.FirstDrop)] = loader.Counter{Packets: sum.Packets, Bytes: sum.Bytes}
		}
	}
	return sums, drops
}
