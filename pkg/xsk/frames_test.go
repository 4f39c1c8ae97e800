package xsk

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// labtestPeer is one more host with an eth0.
func labtestPeer(t testing.TB) *lab.Host {
	t.Helper()
	h, _ := pair(t, 0, 1)
	return h
}

func TestFramesCountReferences(t *testing.T) {
	u, err := NewUMEM(UMEMOptions{Frames: 5, FrameSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	first, err := u.NewFrames(2)
	if err != nil {
		t.Fatal(err)
	}
	second, err := u.NewFrames(3)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint64{2 * 4096, 3 * 4096, 4 * 4096} {
		if addr, ok := second.Get(); !ok || addr != want {
			t.Fatalf("frame %d at %#x, %v: want %#x", i, addr, ok, want)
		}
	}
	if _, ok := second.Get(); ok {
		t.Fatal("a fourth of three frames")
	}
	second.Retain(3*4096, 2)
	for _, want := range []int{0, 0, 1} {
		second.Release(3*4096 + 777) // anywhere inside it
		if second.Free() != want {
			t.Fatalf("%d free: want %d", second.Free(), want)
		}
	}
	if addr, ok := second.Get(); !ok || addr != 3*4096 {
		t.Fatalf("got %#x, %v: want the frame used last", addr, ok)
	}
	if first.Free() != 2 || first.Len() != 2 || second.Len() != 3 || first.Verify() != nil || second.Verify() != nil {
		t.Errorf("first %+v, second %+v", first, second)
	}
	for _, n := range []int{-1, 0, 1} {
		if _, err := u.NewFrames(n); err == nil {
			t.Errorf("%d more frames of none", n)
		}
	}
}

func TestData(t *testing.T) {
	u, err := NewUMEM(UMEMOptions{Frames: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	const size = 3 * 2048
	for _, c := range []struct {
		d    Desc
		want int // -1: nil
	}{
		{Desc{Addr: 0, Len: 10}, 10},
		{Desc{Addr: size - 10, Len: 10}, 10},
		{Desc{Addr: size, Len: 0}, 0},
		{Desc{Addr: size - 10, Len: 11}, -1},
		{Desc{Addr: size + 1, Len: 0}, -1},
		{Desc{Addr: ^uint64(0), Len: 1}, -1},
		{Desc{Addr: ^uint64(0), Len: ^uint32(0)}, -1},
		{Desc{Addr: 0, Len: ^uint32(0)}, -1},
	} {
		got := u.Data(c.d)
		if (got == nil) != (c.want < 0) || got != nil && (len(got) != c.want || cap(got) != c.want) {
			t.Errorf("%+v: %d bytes of %d", c.d, len(got), cap(got))
		}
	}
	if f := u.Frame(2048 + 100); len(f) != 2048 || &f[0] != &u.mem[2048] {
		t.Errorf("frame of %d bytes", len(f))
	}
	if u.Frame(size) != nil {
		t.Error("a frame outside of the UMEM")
	}
}

// Each misuse is detected and named, and changes nothing.
func TestOwnership(t *testing.T) {
	host, _ := pair(t, 0, 1)
	for _, c := range []struct {
		name string
		// always: also without CheckOwnership.
		always bool
		misuse func(f *Frames, s *Socket, addr uint64) error
		want   string
	}{
		{"double release", true, func(f *Frames, _ *Socket, addr uint64) error { f.Release(addr); f.Release(addr); return nil }, "release of frame 0x0, which is free"},
		{"release of another's", true, func(f *Frames, _ *Socket, _ uint64) error { f.Release(1 << 40); return nil }, "of another owner"},
		{"retain when free", true, func(f *Frames, _ *Socket, addr uint64) error { f.Release(addr); f.Retain(addr, 1); return nil }, "retain of frame 0x0, which is free"},
		{"send when free", true, func(f *Frames, s *Socket, addr uint64) error {
			f.Release(addr)
			_, err := s.Send([]Desc{{Addr: addr, Len: 60}})
			return err
		}, "send of frame 0x0, which is free"},
		{"release in the TX ring", false, func(f *Frames, s *Socket, addr uint64) error {
			_, err := s.Send([]Desc{{Addr: addr, Len: 60}})
			f.Release(addr)
			return err
		}, "release of frame 0x0, which is in the TX ring"},
		{"send twice", false, func(_ *Frames, s *Socket, addr uint64) error {
			_, err := s.Send([]Desc{{Addr: addr, Len: 60}, {Addr: addr, Len: 60}})
			return err
		}, "send of frame 0x0, which is in the TX ring"},
		{"release in the fill ring", false, func(f *Frames, s *Socket, _ uint64) error { s.Fill(1); f.Release(2048); return nil }, "release of frame 0x800, which is in the fill ring"},
		{"send in the fill ring", false, func(_ *Frames, s *Socket, _ uint64) error {
			s.Fill(1)
			_, err := s.Send([]Desc{{Addr: 2048, Len: 60}})
			return err
		}, "send of frame 0x800, which is in the fill ring"},
		{"retain in the fill ring", false, func(f *Frames, s *Socket, _ uint64) error { s.Fill(1); f.Retain(2048, 1); return nil }, "retain of frame 0x800, which is in the fill ring"},
		{"receive of what was not filled", true, func(_ *Frames, s *Socket, addr uint64) error {
			s.rx.entries[0] = Desc{Addr: addr, Len: 60}
			s.rx.producer.Add(1)
			s.Receive(make([]Desc, 1))
			return nil
		}, "receive of frame 0x0"},
		{"completion of what was not sent", true, func(_ *Frames, s *Socket, addr uint64) error {
			s.comp.entries[0] = addr
			s.comp.producer.Add(1)
			s.Complete(1)
			return nil
		}, "completion of frame 0x0"},
	} {
		for _, check := range []bool{true, false} {
			if !check && !c.always {
				continue
			}
			u, err := NewUMEM(UMEMOptions{Frames: 8, CheckOwnership: check})
			if err != nil {
				t.Fatal(err)
			}
			f, err := u.NewFrames(8)
			if err != nil {
				t.Fatal(err)
			}
			s := openOn(t, host, "eth0", f, 0, Options{FillSize: 8, RXSize: 8})
			addr, _ := f.Get()
			sendErr := c.misuse(f, s, addr)
			err = f.Verify()
			if !errors.Is(err, ErrOwnership) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s, check %v: %v: want %q", c.name, check, err, c.want)
			}
			if strings.HasPrefix(c.name, "send") && !errors.Is(sendErr, ErrOwnership) {
				t.Errorf("%s, check %v: %v from Send", c.name, check, sendErr)
			}
			f.err = nil
			if err := f.Verify(); err != nil {
				t.Errorf("%s, check %v: afterwards %v", c.name, check, err)
			}
			if err := errors.Join(s.Close(), u.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}

// Verify itself detects wrong reference counts.
func TestVerifyCounts(t *testing.T) {
	for name, damage := range map[string]func(f *Frames){
		"lost reference":    func(f *Frames) { f.held[0]-- },
		"too many":          func(f *Frames) { f.refs[0]++ },
		"free and in use":   func(f *Frames) { f.free = append(f.free, 0) },
		"twice in the list": func(f *Frames) { f.free[0] = f.free[1] },
	} {
		u, err := NewUMEM(UMEMOptions{Frames: 4, CheckOwnership: true})
		if err != nil {
			t.Fatal(err)
		}
		f, err := u.NewFrames(4)
		if err != nil {
			t.Fatal(err)
		}
		f.Get()
		if err := f.Verify(); err != nil {
			t.Errorf("%s: before %v", name, err)
		}
		damage(f)
		if err := f.Verify(); !errors.Is(err, ErrOwnership) {
			t.Errorf("%s: %v", name, err)
		}
		if err := u.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Any sequence of correct operations, on sockets opened and closed while packets are
// in flight, accounts for every reference exactly once.
func TestRandomTransfers(t *testing.T) {
	a, b := pair(t, 0, 1)
	hosts := []*lab.Host{a, b}
	multiBuffer := labtest.MultiBufferSockets(t)
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			u, f := makeUMEM(t, UMEMOptions{Frames: 96, MultiBuffer: multiBuffer})
			opts := Options{FillSize: 32, CompletionSize: 16, RXSize: 16, TXSize: 16}
			sockets := []*Socket{openOn(t, a, "eth0", f, 0, opts), openOn(t, b, "eth0", f, 0, opts)}
			for i, h := range hosts {
				redirect(t, h, "eth0", sockets[i])
			}
			var mine []uint64 // an address for each reference
			var descs [8]Desc
			for step := range 3000 {
				s := sockets[random.IntN(2)]
				switch op := random.IntN(9); {
				case op == 0:
					if addr, ok := f.Get(); ok {
						copy(u.Frame(addr), frame(uint32(step), 100))
						mine = append(mine, addr)
					}
				case op == 1 && len(mine) > 0:
					addr := mine[random.IntN(len(mine))]
					f.Retain(addr, 2)
					mine = append(mine, addr, addr)
				case op == 2 && len(mine) > 0:
					f.Release(mine[len(mine)-1])
					mine = mine[:len(mine)-1]
				case op == 3:
					s.Fill(random.IntN(20))
				case op == 4 && len(mine) > 0:
					n := 1 + random.IntN(min(len(mine), len(descs)))
					for i, addr := range mine[len(mine)-n:] {
						descs[i] = Desc{Addr: addr, Len: 100}
						if multiBuffer {
							descs[i].Options = Continued & uint32(random.IntN(2))
						}
					}
					descs[n-1].Options = 0
					took, err := s.Send(descs[:n])
					if err != nil {
						t.Fatal(err)
					}
					rest := append([]uint64(nil), mine[len(mine)-n+took:]...)
					mine = append(mine[:len(mine)-n], rest...)
				case op == 5:
					flush(t, s)
				case op == 6:
					s.Complete(random.IntN(20))
				case op == 7:
					for _, d := range descs[:s.Receive(descs[:])] {
						mine = append(mine, d.Addr)
					}
				case op == 8 && random.IntN(200) == 0:
					i := random.IntN(2)
					if err := sockets[i].Close(); err != nil {
						t.Fatal(err)
					}
					sockets[i] = openOn(t, hosts[i], "eth0", f, 0, opts)
				}
				if err := f.Verify(); err != nil {
					t.Fatalf("step %d: %v", step, err)
				}
			}
			for _, addr := range mine {
				f.Release(addr)
			}
			for _, s := range sockets {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
			if f.Free() != f.Len() {
				t.Errorf("%d of %d frames are free, %d retired", f.Free(), f.Len(), f.Retired())
			}
		})
	}
}

// Verify reports the first misuse, since later ones may be its consequences.
func TestVerifyTellsTheFirst(t *testing.T) {
	u, err := NewUMEM(UMEMOptions{Frames: 4, CheckOwnership: true})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	f, err := u.NewFrames(4)
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := f.Get()
	f.Release(addr)
	f.Release(addr) // the first
	f.Retain(addr+uint64(u.FrameSize()), 1)
	f.Release(1 << 40)
	var misuse *OwnershipError
	if err := f.Verify(); !errors.As(err, &misuse) || misuse.Op != "release" || misuse.Addr != addr {
		t.Errorf("Verify: %+v, want the second release of %#x", err, addr)
	}
}
