package forward

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"xdpcast/internal/flowtest"
	"xdpcast/internal/labtest"
)

const testState = 7

// keepRules waits until the rules are kept.
func (b *handoverBench) keepRules(t *testing.T) {
	t.Helper()
	labtest.Eventually(t, "the rules are kept", func() bool {
		labtest.Do(t, b.relay, func() error {
			b.path.KeepRules(func() (uint32, error) { return testState, nil })
			return nil
		})
		return b.path.rules.valid
	})
}

// continued opens the path with kept rules.
func (b *handoverBench) continued(t *testing.T) {
	t.Helper()
	opts := b.opts
	opts.Blocks, opts.BlockTimeout = 32, 20*time.Millisecond // as bench.path
	opts.Inherited = b.keeper.handover()
	rules, err := b.read(t, opts.Inherited)
	if err != nil {
		t.Fatal(err)
	}
	if rules.State != testState || len(rules.Flows) != 1 || !rules.Flows[0].Equal(b.rule) {
		t.Fatalf("rules %+v, want %+v", rules, b.rule)
	}
	labtest.Do(t, b.relay, func() (err error) {
		b.path, err = ContinueFanout(opts, rules)
		return err
	})
	t.Cleanup(func() { _ = b.path.Close() })
}

// read reads kept rules.
func (b *handoverBench) read(t *testing.T, h *FanoutHandover) (r *FanoutRules, err error) {
	labtest.Do(t, b.relay, func() error {
		r, err = h.Rules()
		return nil
	})
	return r, err
}

// A path forwards with kept rules, without any other knowledge of them, what has waited and what comes: once and in order;
// and goes on with the same rules, or others.
func TestFanoutContinues(t *testing.T) {
	b := newHandoverBench(t)
	send, total := b.sends(t)
	b.open(t, b.rule)
	b.keepRules(t)
	send(20)
	for range 3 {
		b.close(t)
		send(20) // to nobody yet
		b.continued(t)
		send(20)
		b.arrived.check(t, *total)
		b.checkKept(t, 2+2*2+1, "those of one group, and the rules")
	}
	b.sync(t, b.path, b.rule)
	if !b.path.rules.valid {
		t.Error("the same rules are not kept any more")
	}
	send(20)
	b.arrived.check(t, *total)

	// A change invalidates them at once, for whoever comes next; they are kept again later.
	next := b.rule
	next.Name = "other"
	h := b.keeper.handover()
	defer h.Close()
	b.sync(t, b.path, next)
	if _, err := b.read(t, h); !errors.Is(err, errNoRules) {
		t.Errorf("after a change the rules are %v", err)
	}
	b.rule = next
	b.keepRules(t)
	b.checkKept(t, 2+2*2+1, "those of one group, and the rules")
	b.path.SetOwnMACs([][6]byte{{2, 0, 0, 0, 0, 9}})
	if _, err := b.read(t, h); !errors.Is(err, errNoRules) {
		t.Errorf("after a change of this host's addresses the rules are %v", err)
	}
	b.keepRules(t)
	r, err := b.read(t, h)
	if err != nil || len(r.OwnMACs) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	if err := b.path.Suspend(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.read(t, h); !errors.Is(err, errNoRules) {
		t.Errorf("after a handover the rules are %v", err)
	}
}

// Kept rules that do not fit are refused, each with its reason.
func TestFanoutRulesThatDoNotFit(t *testing.T) {
	b := newHandoverBench(t)
	b.open(t, b.rule)
	b.keepRules(t)
	b.close(t)
	file := b.keeper.files[rulesName]
	intact := make([]byte, 1<<16)
	n, err := unix.Pread(file, intact, 0)
	if err != nil {
		t.Fatal(err)
	}
	intact = intact[:n]
	written := func(edit func(r *FanoutRules)) []byte {
		var r FanoutRules
		if err := json.Unmarshal(intact[rulesHeader:], &r); err != nil {
			t.Fatal(err)
		}
		edit(&r)
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		data := append(append([]byte{}, intact[:rulesHeader]...), text...)
		binary.LittleEndian.PutUint32(data[offsetSize:], uint32(len(text)))
		return data
	}
	header := func(offset int, value uint32) []byte {
		data := append([]byte{}, intact...)
		binary.LittleEndian.PutUint32(data[offset:], value)
		return data
	}
	for _, c := range []struct {
		data []byte
		want string
	}{
		{intact, ""},
		{header(0, 0), "another release"},
		{header(offsetValid, 0), errNoRules.Error()},
		{header(offsetSize, uint32(len(intact))), "bytes of rules"},
		{intact[:rulesHeader-1], "bytes of rules"},
		{intact[:len(intact)-1], "bytes of rules"},
		{header(offsetStamp+4, 0), "want at most 13s"},
		{header(offsetStamp+4, 1<<31), "want at most 13s"},
		{append(append([]byte{}, intact[:rulesHeader]...), strings.Repeat("{", len(intact))...), "rules: "},
		{written(func(r *FanoutRules) { r.Program += "0" }), "another program"},
		{written(func(r *FanoutRules) { r.Flows = nil }), errNoRules.Error()},
		{written(func(r *FanoutRules) { r.Flows[0].In.FromHost = true }), "rule r has no kept ring"},
		{written(func(r *FanoutRules) { r.Links[0].Name += "x" }), "interfaces have changed"},
		{written(func(r *FanoutRules) { r.Links[0].MAC[5]++ }), "interfaces have changed"},
		{written(func(r *FanoutRules) { r.Links = r.Links[1:] }), "interfaces have changed"},
	} {
		if err := unix.Ftruncate(file, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Pwrite(file, c.data, 0); err != nil {
			t.Fatal(err)
		}
		h := b.keeper.handover()
		_, err := b.read(t, h)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("the error is %v, want %q", err, c.want)
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := (*FanoutHandover)(nil).Rules(); !errors.Is(err, errNoRules) {
		t.Errorf("the rules of nothing: %v", err)
	}
}

// Every field of a flow is kept.
func TestFanoutRulesAreComplete(t *testing.T) {
	two := []flowtest.Interface{{Index: 2, MAC: [6]byte{2, 0, 0, 0, 0, 2}}, {Index: 3, MAC: [6]byte{2, 0, 0, 0, 0, 3}}}
	w := &flowtest.World{Rand: rand.New(rand.NewPCG(1, 1)), In: two, Out: two}
	for set := range 200 {
		rules := FanoutRules{Flows: w.Rules(set % 4), Own: flowtest.OwnAddresses()}
		full := rules.Flows[0]
		fill(reflect.ValueOf(&full).Elem())
		rules.Flows = append(rules.Flows, full)
		text, err := json.Marshal(rules)
		if err != nil {
			t.Fatal(err)
		}
		var got FanoutRules
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		for i := range rules.Flows {
			if !got.Flows[i].Equal(rules.Flows[i]) {
				t.Fatalf("%+v is read as %+v", rules.Flows[i], got.Flows[i])
			}
		}
		if !reflect.DeepEqual(got.Own, rules.Own) {
			t.Fatalf("%v are read as %v", rules.Own, got.Own)
		}
	}
}

// fill sets every zero field, so that a field that is not kept shows.
func fill(v reflect.Value) {
	switch v.Interface().(type) {
	case netip.Addr:
		v.Set(reflect.ValueOf(netip.MustParseAddr("192.0.2.1")))
		return
	case []netip.Prefix:
		v.Set(reflect.ValueOf([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0))
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i))
		}
	case reflect.Bool:
		v.SetBool(true)
	case reflect.String:
		v.SetString("text")
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(3)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(3)
	}
}

// A path whose rules come and go all the time writes them rarely, and a file that cannot be kept is no fault of the path.
func TestFanoutRulesAreKeptRarely(t *testing.T) {
	b := newHandoverBench(t)
	b.open(t, b.rule)
	b.path.rules.changed = time.Now()
	if _, again := b.path.KeepRules(func() (uint32, error) { t.Error("written at once"); return 0, nil }); again <= 0 || again > keepAfter {
		t.Errorf("again in %v, want up to %v", again, keepAfter)
	}
	b.path.rules.changed = time.Time{}
	if _, again := b.path.KeepRules(func() (uint32, error) { return 0, os.ErrNotExist }); again < stampEvery {
		t.Errorf("again in %v", again)
	}
	b.keeper.full = true
	if _, again := b.path.KeepRules(func() (uint32, error) { return 0, nil }); again < stampEvery || b.path.rules.file != nil {
		t.Errorf("again in %v, file %v", again, b.path.rules.file)
	}
	b.keeper.full = false
	b.keepRules(t)
	if _, again := b.path.KeepRules(nil); again <= 0 || again > stampEvery {
		t.Errorf("again in %v, want up to %v", again, stampEvery)
	}
}
