package tap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

func name(index int) string { return fmt.Sprintf("eth%d", index) }

func newWriter(t *testing.T, out io.Writer, limit uint64) *Writer {
	t.Helper()
	w, err := NewWriter(out, "test", name, limit)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func record(at int64, text string) *Record {
	return &Record{Time: at, Index: 1, Length: len(text), Data: []byte(text), Rule: "cam1", Slot: NoSlot}
}

// blocks returns the kinds of a file's blocks, whose lengths must agree.
func blocks(t *testing.T, file []byte) (kinds []uint32, bodies [][]byte) {
	t.Helper()
	for len(file) > 0 {
		n := int(binary.LittleEndian.Uint32(file[4:]))
		if n%4 != 0 || n > len(file) || int(binary.LittleEndian.Uint32(file[n-4:])) != n {
			t.Fatalf("block of %d bytes", n)
		}
		kinds, bodies = append(kinds, binary.LittleEndian.Uint32(file)), append(bodies, file[8:n-4])
		file = file[n:]
	}
	return kinds, bodies
}

// Packets of several sources are written in the order of their time, up to the limit.
func TestOrderAndLimit(t *testing.T) {
	var out bytes.Buffer
	w := newWriter(t, &out, 3)
	for _, at := range []int64{30, 10, 20, 40} {
		w.Add(record(at, fmt.Sprint(at)))
	}
	if more, err := w.Flush(0); more || err != nil {
		t.Errorf("after the limit: %v, %v", more, err)
	}
	w.Add(record(50, "50"))
	if err := w.Close(7); err != nil {
		t.Fatal(err)
	}
	kinds, bodies := blocks(t, out.Bytes())
	if want := "[168627466 1 6 6 6 5]"; fmt.Sprint(kinds) != want {
		t.Errorf("blocks %v, want %s", kinds, want)
	}
	for i, want := range []string{"10", "20", "30"} {
		if got := string(bodies[2+i][20:22]); got != want {
			t.Errorf("packet %d is %s, want %s", i, got, want)
		}
	}
	if w.Written() != 3 {
		t.Errorf("%d packets, want 3", w.Written())
	}
	var copied bytes.Buffer
	var r Reader
	if err := r.Copy(&copied, bytes.NewReader(out.Bytes())); !errors.Is(err, io.EOF) {
		t.Errorf("copy: %v", err)
	}
	if r.Packets != 3 || r.Lost != 7 || !bytes.Equal(copied.Bytes(), out.Bytes()) {
		t.Errorf("copied %d packets, %d lost, %d of %d bytes", r.Packets, r.Lost, copied.Len(), out.Len())
	}
}

// Lost packets are recorded even if none was written.
func TestAllLost(t *testing.T) {
	var out bytes.Buffer
	w := newWriter(t, &out, 0)
	if err := w.Close(5); err != nil {
		t.Fatal(err)
	}
	if kinds, _ := blocks(t, out.Bytes()); fmt.Sprint(kinds) != "[168627466 1 5]" {
		t.Errorf("blocks %v", kinds)
	}
}

// A truncated file is copied up to its last whole block, and never taken for complete.
func TestCopyCut(t *testing.T) {
	var out bytes.Buffer
	w := newWriter(t, &out, 0)
	w.Add(record(1, strings.Repeat("x", 99)))
	if err := w.Close(0); err != nil {
		t.Fatal(err)
	}
	ends := map[int]bool{}
	kinds, bodies := blocks(t, out.Bytes())
	at := 0
	for i := range kinds {
		at += len(bodies[i]) + 12
		ends[at] = true
	}
	for n := 1; n <= out.Len(); n++ {
		var copied bytes.Buffer
		err := new(Reader).Copy(&copied, bytes.NewReader(out.Bytes()[:n]))
		if whole := errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF); whole != ends[n] {
			t.Errorf("%d bytes: %v", n, err)
		}
		if copied.Len() > 0 && !ends[copied.Len()] {
			t.Errorf("%d bytes: %d copied", n, copied.Len())
		}
	}
}

// For any input, Copy terminates and does not panic.
func FuzzCopy(f *testing.F) {
	var out bytes.Buffer
	if w, err := NewWriter(&out, "test", name, 0); err == nil {
		w.Add(record(1, "packet"))
		_ = w.Close(3)
	}
	f.Add(out.Bytes())
	f.Add([]byte("no blocks at all"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := new(Reader).Copy(io.Discard, bytes.NewReader(data)); err == nil {
			t.Error("copying ended without an end")
		}
	})
}

func TestComments(t *testing.T) {
	for _, c := range []struct {
		r    Record
		want string
	}{
		{Record{Rule: "cam1", Slot: NoSlot}, "rule cam1, in"},
		{Record{Rule: "cam1", Slot: 3, Out: true}, "rule cam1, slot 3, out"},
		{Record{Rule: "cam1", Slot: 3, Out: true, Drops: []Drop{{3, "ttl"}}}, "rule cam1, slot 3, not sent"},
	} {
		if got := string(c.r.comment(nil)); got != c.want {
			t.Errorf("%+v: %q, want %q", c.r, got, c.want)
		}
	}
	if got := string(Drop{NoSlot, "loop"}.comment(nil)) + "|" + string(Drop{2, "ttl"}.comment(nil)); got != "dropped: loop|slot 2 dropped: ttl" {
		t.Errorf("drops: %q", got)
	}
}

func TestCheck(t *testing.T) {
	if err := Everything.Check(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(o *Options){
		"nothing to tap":    func(o *Options) { *o = Options{Sample: 1, Snap: 1} },
		"sample 1 of 0":     func(o *Options) { o.Sample = 0 },
		"snap 0: want 1 to": func(o *Options) { o.Snap = 0 },
		"snap 61441: want":  func(o *Options) { o.Snap = MaxSnap + 1 },
	} {
		o := Everything
		change(&o)
		if err := o.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", o, err, want)
		}
	}
}

type broken struct{ after int }

func (b *broken) Write(p []byte) (int, error) {
	if b.after--; b.after < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

// A reader that closes ends the file at once, and every Flush returns the error.
func TestReaderGone(t *testing.T) {
	w := newWriter(t, &broken{after: 1}, 0)
	w.Add(record(1, "packet"))
	for range 2 {
		if more, err := w.Flush(0); more || !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("flush: %v, %v", more, err)
		}
	}
}
