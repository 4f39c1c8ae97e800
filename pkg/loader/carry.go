package loader

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"xdpcast/bpf"
)

// carry holds the counters of maps that a migration replaces. They are copied before any program
// counts in the new maps. What the old programs count after that is added once the last of them has
// ended, while the new ones keep counting.
type carry struct {
	maps []*carriedMap
	done func() error // closes the maps
}

// carriedKey is the key of a counter as stored in the kernel: 4 or 8 bytes.
type carriedKey [8]byte

func indexKey(i uint32) (key carriedKey) {
	*(*uint32)(unsafe.Pointer(&key)) = i
	return key
}

func (k carriedKey) index() uint32 { return *(*uint32)(unsafe.Pointer(&k)) }

// carriedMap holds the counters of one map.
type carriedMap struct {
	name string
	to   *ebpf.Map
	// adds has, for each counted word, the words of to's values to which it is added.
	adds [][]int
	// read returns the sums over all CPUs from the old maps.
	read func() (map[carriedKey][]uint64, error)
	// put writes the result of the first read, before any program uses the map. create adds a zero
	// entry, which a hash needs; nil if the map has all entries.
	put    func(carriedKey, []uint64) error
	create func(carriedKey) error

	copied map[carriedKey][]uint64
}

// copy is the first half: it copies the counters.
func (c *carry) copy() error {
	for _, m := range c.maps {
		var err error
		if m.copied, err = m.read(); err != nil {
			return fmt.Errorf("read the counters of map %s: %w", m.name, err)
		}
		for key, words := range m.copied {
			if err := m.put(key, words); err != nil {
				return fmt.Errorf("carry the counters of map %s over: %w", m.name, err)
			}
		}
	}
	return nil
}

// finish is the second half, after the old programs have ended: it adds what they counted since. It
// returns how many counters grew.
func (c *carry) finish() (grown int, err error) {
	for _, m := range c.maps {
		n, err := m.finish()
		if err != nil {
			return grown, fmt.Errorf("add to the counters of map %s: %w", m.name, err)
		}
		grown += n
	}
	return grown, nil
}

func (m *carriedMap) finish() (grown int, err error) {
	now, err := m.read()
	if err != nil {
		return 0, err
	}
	var adder *ebpf.Program
	defer func() { err = errors.Join(err, adder.Close()) }()
	for key, words := range now {
		grew := make([]uint64, 1+len(words))
		*(*carriedKey)(unsafe.Pointer(&grew[0])) = key
		some := false
		for i, word := range words {
			grew[1+i] = word
			if before := m.copied[key]; before != nil {
				grew[1+i] -= before[i]
			}
			some = some || grew[1+i] != 0
		}
		if !some {
			continue
		}
		if adder == nil {
			if adder, err = m.newAdder(); err != nil {
				return 0, err
			}
		}
		if m.create != nil {
			if err := m.create(key); err != nil {
				return 0, err
			}
		}
		found, err := adder.Run(&ebpf.RunOptions{Context: grew})
		if err != nil {
			return 0, err
		}
		if found != 0 {
			grown++
		}
	}
	return grown, nil
}

// newAdder loads a program that adds words to the counters of the CPU on which it runs. Its context
// is the key and the words to add. A program that updates the same counters may interrupt it, but
// no update is lost: this program adds with one instruction, and the other completes before this
// one resumes.
func (m *carriedMap) newAdder() (*ebpf.Program, error) {
	const key = -8 // on the stack
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, 0, asm.DWord),
		asm.StoreMem(asm.RFP, key, asm.R2, asm.DWord),
		asm.LoadMapPtr(asm.R1, m.to.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, key),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "exit"),
	}
	for i, at := range m.adds {
		code = append(code, asm.LoadMem(asm.R1, asm.R6, int16(8+8*i), asm.DWord))
		for _, word := range at {
			code = append(code, asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, int16(8*word)))
		}
	}
	code = append(code, asm.Mov.Imm(asm.R0, 1), asm.Return().WithSymbol("exit"))
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "xdpcast_add", Type: ebpf.RawTracepoint, License: "Dual BSD/GPL", Instructions: code})
	if err != nil {
		return nil, fmt.Errorf("load the program that adds: %w", err)
	}
	return p, nil
}

// sumWords sums the first n words of each CPU's value.
func sumWords(perCPU []byte, cpus, n int) []uint64 {
	sum := make([]uint64, n)
	size := len(perCPU) / cpus
	for cpu := range cpus {
		for i, word := range unsafe.Slice((*uint64)(unsafe.Pointer(&perCPU[cpu*size])), n) {
			sum[i] += word
		}
	}
	return sum
}

// carryCounters prepares carrying an old schema's counters into new maps.
func (m *migration) carryCounters() (*carry, error) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("possible cpus: %w", err)
	}
	c := &carry{}
	if m.anew(bpf.RelayMapRuleStats) {
		c.maps = append(c.maps, m.carryRules(cpus))
	}
	if m.anew(bpf.RelayMapPassed) {
		c.maps = append(c.maps, m.carryArray(cpus, bpf.RelayMapPassed, func(i uint32) uint32 { return i }))
	}
	if m.anew(bpf.RelayMapDrops) {
		c.maps = append(c.maps, m.carryArray(cpus, bpf.RelayMapDrops, m.reason))
	}
	if m.anew(bpf.RelayMapRuleDrops) {
		c.maps = append(c.maps, m.carryRuleDrops(cpus))
	}
	return c, nil
}

// reason is the current number of a drop reason of the old schema.
func (m *migration) reason(then uint32) uint32 {
	if then == m.old.internal {
		return uint32(Internal)
	}
	return then
}

// Words of struct rule_stats.
const (
	wordPackets     = int(unsafe.Offsetof(bpf.RelayRuleStats{}.Packets)) / 8
	wordBytes       = int(unsafe.Offsetof(bpf.RelayRuleStats{}.Bytes)) / 8
	wordSentPackets = int(unsafe.Offsetof(bpf.RelayRuleStats{}.SentPackets)) / 8
	wordSentBytes   = int(unsafe.Offsetof(bpf.RelayRuleStats{}.SentBytes)) / 8
	wordLookUntil   = int(unsafe.Offsetof(bpf.RelayRuleStats{}.LookUntil)) / 8
	wordTickPackets = int(unsafe.Offsetof(bpf.RelayRuleStats{}.TickPackets)) / 8
	wordHanded      = int(unsafe.Offsetof(bpf.RelayRuleStats{}.HandedPackets)) / 8
	wordCopies      = int(unsafe.Offsetof(bpf.RelayRuleStats{}.CopiesPackets)) / 8
)

// carryRules carries the counts of matched packets, and of packets sent by a rule's only output:
// before schema 7 those were in output_stats. The loop guard must not mistake them for new packets.
func (m *migration) carryRules(cpus int) *carriedMap {
	c := &carriedMap{
		name: bpf.RelayMapRuleStats, to: m.fresh[bpf.RelayMapRuleStats],
		adds: [][]int{
			{wordPackets, wordLookUntil, wordTickPackets}, {wordBytes},
			{wordHanded}, {wordHanded + 1}, {wordCopies}, {wordCopies + 1}, {wordSentPackets}, {wordSentBytes},
		},
	}
	lastSeen := map[carriedKey]uint64{}
	c.read = func() (map[carriedKey][]uint64, error) {
		all := make(map[carriedKey][]uint64, len(m.rules))
		for id, stats := range m.rules {
			perCPU, err := m.have[bpf.RelayMapRuleStats].LookupBytes(id)
			if err != nil || perCPU == nil {
				return nil, errors.Join(fmt.Errorf("rule number %d: %w", id, ebpf.ErrKeyNotExist), err)
			}
			then := sumWords(perCPU, cpus, m.old.counted)
			words := make([]uint64, len(c.adds))
			copy(words, then[:2])
			copy(words[2:6], then[3:])
			for cpu := range cpus {
				seen := unsafe.Slice((*uint64)(unsafe.Pointer(&perCPU[cpu*len(perCPU)/cpus])), 3)[2]
				lastSeen[indexKey(id)] = max(lastSeen[indexKey(id)], seen)
			}
			if stats.outputs == 1 {
				if perCPU, err = m.have[bpf.RelayMapOutputStats].LookupBytes(stats.first); err != nil || perCPU == nil {
					return nil, errors.Join(fmt.Errorf("output counters %d: %w", stats.first, ebpf.ErrKeyNotExist), err)
				}
				copy(words[6:], sumWords(perCPU, cpus, 2))
			}
			all[indexKey(id)] = words
		}
		return all, nil
	}
	c.put = func(key carriedKey, words []uint64) error {
		values := make([]bpf.RelayRuleStats, cpus)
		first := unsafe.Slice((*uint64)(unsafe.Pointer(&values[0])), unsafe.Sizeof(values[0])/8)
		for i, at := range c.adds {
			for _, word := range at {
				first[word] = words[i]
			}
		}
		values[0].LastSeenNs = lastSeen[key]
		return c.to.Put(key.index(), values)
	}
	return c
}

// carryArray carries an array of struct counter; now maps an old index to the current one.
func (m *migration) carryArray(cpus int, name string, now func(uint32) uint32) *carriedMap {
	c := &carriedMap{name: name, to: m.fresh[name], adds: [][]int{{0}, {1}}}
	c.read = func() (map[carriedKey][]uint64, error) {
		all := map[carriedKey][]uint64{}
		for i := range m.have[name].MaxEntries() {
			perCPU, err := m.have[name].LookupBytes(i)
			if err != nil || perCPU == nil {
				return nil, errors.Join(fmt.Errorf("entry %d: %w", i, ebpf.ErrKeyNotExist), err)
			}
			all[indexKey(now(i))] = sumWords(perCPU, cpus, len(c.adds))
		}
		return all, nil
	}
	c.put = func(key carriedKey, words []uint64) error { return c.to.Put(key.index(), firstCPU(cpus, words)) }
	return c
}

func firstCPU(cpus int, words []uint64) []bpf.RelayCounter {
	values := make([]bpf.RelayCounter, cpus)
	values[0] = bpf.RelayCounter{Packets: words[0], Bytes: words[1]}
	return values
}

// carryRuleDrops carries the drops of rules and outputs.
func (m *migration) carryRuleDrops(cpus int) *carriedMap {
	c := &carriedMap{name: bpf.RelayMapRuleDrops, to: m.fresh[bpf.RelayMapRuleDrops], adds: [][]int{{0}, {1}}}
	keyOf := func(key carriedKey) bpf.RelayDropKey { return *(*bpf.RelayDropKey)(unsafe.Pointer(&key)) }
	c.read = func() (map[carriedKey][]uint64, error) {
		all := map[carriedKey][]uint64{}
		var key bpf.RelayDropKey
		var perCPU []bpf.RelayCounter
		iter := m.have[bpf.RelayMapRuleDrops].Iterate()
		for iter.Next(&key, &perCPU) {
			now := key
			if bpf.RelayDropScope(key.Scope) != bpf.RelayDropScopeDROP_NOTE {
				now.Reason = uint16(m.reason(uint32(key.Reason)))
			}
			total := sum(perCPU)
			all[*(*carriedKey)(unsafe.Pointer(&now))] = []uint64{total.Packets, total.Bytes}
		}
		return all, iter.Err()
	}
	c.put = func(key carriedKey, words []uint64) error {
		drop := keyOf(key)
		return c.to.Put(&drop, firstCPU(cpus, words))
	}
	c.create = func(key carriedKey) error {
		drop := keyOf(key)
		err := c.to.Update(&drop, make([]bpf.RelayCounter, cpus), ebpf.UpdateNoExist)
		if errors.Is(err, ebpf.ErrKeyExist) {
			return nil
		}
		return err
	}
	return c
}
