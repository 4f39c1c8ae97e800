package xsk

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"xdpcast/internal/labtest"
)

func duplicate(t *testing.T, fd int) int {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestInherit continues with a socket through duplicates of its descriptors, as another process does: packets that
// arrived before, between and afterwards are received once and in order, and frames are sent.
func TestInherit(t *testing.T) {
	labtest.RequireRoot(t)
	const frames = 128
	a, b := pair(t, 1500, 1)
	opts := UMEMOptions{Frames: frames, Shared: true}
	sizes := Options{FillSize: 64, CompletionSize: 64, RXSize: 64, TXSize: 64}
	memory, own := makeUMEM(t, opts)
	old := openOn(t, a, "eth0", own, 0, sizes)
	redirect(t, a, "eth0", old)
	if got := old.Fill(64); got != 64 {
		t.Fatalf("%d frames filled", got)
	}
	_, theirs := makeUMEM(t, UMEMOptions{Frames: frames})
	peer := openOn(t, b, "eth0", theirs, 0, sizes)
	redirect(t, b, "eth0", peer)
	peer.Fill(64)

	number := uint32(0)
	arrives := func(n int) {
		t.Helper()
		if err := sendNumbered(peer, number, n); err != nil {
			t.Fatal(err)
		}
		number += uint32(n)
		completeAll(t, peer)
	}
	next := uint32(0)
	expect := func(s *Socket, n int) {
		t.Helper()
		for _, p := range receive(t, s, n) {
			equal(t, "received", p, frame(next, len(p)))
			next++
		}
	}
	current := old
	for range 3 {
		arrives(5)
		expect(current, 5)
		send(t, current, write(t, current.Frames(), frame(77, 64), 2048))
		completeAll(t, current)
		receive(t, peer, 1)

		u, err := InheritUMEM(duplicate(t, current.Frames().UMEM().FD()), UMEMOptions{Frames: frames, CheckOwnership: true})
		if err != nil {
			t.Fatal(err)
		}
		f, err := u.NewFrames(frames)
		if err != nil {
			t.Fatal(err)
		}
		heir, err := Inherit(f, duplicate(t, current.FD()), current.Ifindex(), 0, sizes)
		if errors.Is(err, unix.EBUSY) {
			labtest.NeedsKernel(t, false, "mapping the rings of a bound AF_XDP socket", "6.4")
		}
		if err != nil {
			t.Fatal(err)
		}
		if heir.Receive(make([]Desc, 8)) != 0 || heir.Fill(1) != 0 {
			t.Error("an inherited socket works before Resume")
		}
		arrives(5)
		filled, err := current.Suspend()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := current.Suspend(); !errors.Is(err, ErrInUse) {
			t.Errorf("suspended again: %v", err)
		}
		if current.Receive(make([]Desc, 8)) != 0 || current.Fill(1) != 0 || current.Kick() != nil {
			t.Error("a suspended socket works")
		}
		arrives(5)
		if err := heir.Resume(filled[1:]); err == nil {
			t.Error("resumed with less than all frames")
		}
		if err := heir.Resume(filled); err != nil {
			t.Fatal(err)
		}
		if err := heir.Resume(filled); err == nil {
			t.Error("resumed twice")
		}
		if err := errors.Join(current.Close(), current.Frames().Verify()); err != nil {
			t.Fatal(err)
		}
		expect(heir, 10)
		if free := f.Free(); free != frames-64 { // receive has filled the ring again
			t.Errorf("%d frames are free, want %d", free, frames-64)
		}
		current = heir
		t.Cleanup(func() {
			if err := errors.Join(heir.Close(), f.Verify(), u.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	if memory.FD() < 0 {
		t.Error("shared memory has no descriptor")
	}
}

func TestInheritRefuses(t *testing.T) {
	labtest.RequireRoot(t)
	a, _ := pair(t, 1500, 1)
	u, f := makeUMEM(t, UMEMOptions{Frames: 16, Shared: true})
	s := openOn(t, a, "eth0", f, 0, Options{})
	if err := s.Resume(make([]byte, 2)); err == nil {
		t.Error("a socket of this process is resumed")
	}
	send := write(t, f, frame(1, 64), 2048)
	if n, err := s.Send(send); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if _, err := s.Suspend(); !errors.Is(err, ErrInUse) {
		t.Errorf("suspended with a frame in the TX ring: %v", err)
	}
	flush(t, s)
	completeAll(t, s)
	for _, opts := range []UMEMOptions{{Frames: 17}, {Frames: 16, FrameSize: 4096}, {Frames: -1}} {
		if _, err := InheritUMEM(duplicate(t, u.FD()), opts); err == nil {
			t.Errorf("%+v: memory of another size is inherited", opts)
		}
	}
	private, frames := makeUMEM(t, UMEMOptions{Frames: 16})
	if private.FD() != -1 {
		t.Error("private memory has a descriptor")
	}
	if _, err := Inherit(frames, duplicate(t, u.FD()), 1, 0, Options{}); err == nil {
		t.Error("a descriptor that is no socket is inherited")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Suspend(); err == nil {
		t.Error("a closed socket is suspended")
	}
}
