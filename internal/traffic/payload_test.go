package traffic

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"hash/crc32"
	"math"
	"testing"
)

func TestEncodeLayout(t *testing.T) {
	b := make([]byte, 44)
	Encode(b, Header{Stream: 0x0102030405060708, Seq: 1, SentAt: 0x1112131415161718, Flow: 7})
	want := "58445043" + "01" + "00" + "002c" + "0102030405060708" + "0000000000000001" + "1112131415161718" + "00000007"
	if got := hex.EncodeToString(b[:36]); got != want {
		t.Errorf("header\n got %s\nwant %s", got, want)
	}
	if got, want := binary.BigEndian.Uint32(b[36:]), crc32.Checksum(b[:36], crc32.MakeTable(crc32.Castagnoli)); got != want {
		t.Errorf("checksum %08x, want %08x", got, want)
	}
	// Top bytes of 1, 2, 3, 4 times 0x9e3779b97f4a7c15.
	if got := hex.EncodeToString(b[40:]); got != "9e3cda78" {
		t.Errorf("fill %s, want 9e3cda78", got)
	}
}

func TestDecodeReturnsWhatWasEncoded(t *testing.T) {
	for _, size := range []int{HeaderLen, HeaderLen + 1, 1472, MaxPayload} {
		for _, h := range []Header{
			{},
			{Stream: 1, Seq: fillPeriod - 1, SentAt: -5, Flow: 3},
			{Stream: math.MaxUint64, Seq: math.MaxUint64, SentAt: math.MaxInt64, Flow: math.MaxUint32},
		} {
			b := make([]byte, size)
			Encode(b, h)
			if got, err := Decode(b); got != h || err != nil {
				t.Errorf("size %d: got %+v, %v, want %+v", size, got, err, h)
			}
		}
	}
}

func TestDecodeFindsEveryChangedBit(t *testing.T) {
	b := make([]byte, 100)
	Encode(b, Header{Stream: 5, Seq: 77, SentAt: 1 << 60, Flow: 2})
	for bit := range len(b) * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		want := ErrCorrupt
		if bit < 32 {
			want = ErrForeign // the magic is gone
		}
		if _, err := Decode(b); err != want {
			t.Errorf("bit %d changed: got %v, want %v", bit, err, want)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
}

func TestDecodeRefuses(t *testing.T) {
	valid := func(change func(b []byte)) []byte {
		b := make([]byte, 64)
		Encode(b, Header{Stream: 5, Seq: 77})
		change(b)
		binary.BigEndian.PutUint32(b[36:], crc32.Checksum(b[:36], castagnoli))
		return b
	}
	whole := valid(func([]byte) {})
	for _, c := range []struct {
		name string
		in   []byte
		want error
	}{
		{"nothing", nil, ErrForeign},
		{"half a magic", whole[:3], ErrForeign},
		{"another protocol", make([]byte, 1400), ErrForeign},
		{"magic alone", whole[:4], ErrCorrupt},
		{"header cut", whole[:39], ErrCorrupt},
		{"fill cut", whole[:63], ErrCorrupt},
		{"longer than it says", append(bytes.Clone(whole), 0), ErrCorrupt},
		{"another version, intact", valid(func(b []byte) { b[4] = 2 }), ErrVersion},
		{"reserved byte set", valid(func(b []byte) { b[5] = 1 }), ErrCorrupt},
		{"fill of another number", valid(func(b []byte) { b[23]++ }), ErrCorrupt},
		{"longer than any datagram", append(bytes.Clone(whole), make([]byte, MaxPayload)...), ErrCorrupt},
	} {
		if h, err := Decode(c.in); err != c.want || h != (Header{}) {
			t.Errorf("%s: got %+v, %v, want %v", c.name, h, err, c.want)
		}
	}
}

// FuzzDecode: an error xor a header, and only what Encode makes is accepted.
func FuzzDecode(f *testing.F) {
	b := make([]byte, 60)
	Encode(b, Header{Stream: 5, Seq: 77, SentAt: 99, Flow: 2})
	f.Add(b)
	f.Add(b[:41])
	f.Add([]byte("XDPC"))
	f.Fuzz(func(t *testing.T, in []byte) {
		h, err := Decode(in)
		if err != nil {
			if h != (Header{}) {
				t.Fatalf("header %+v with error %v", h, err)
			}
			return
		}
		again := make([]byte, len(in))
		if Encode(again, h); !bytes.Equal(again, in) {
			t.Fatalf("accepted what Encode does not make: %x", in)
		}
	})
}

// FuzzEncode: whatever is encoded comes back, and a changed byte is found.
func FuzzEncode(f *testing.F) {
	f.Add(uint64(1), uint64(2), int64(3), uint32(4), uint16(100), uint16(50), byte(1))
	f.Fuzz(func(t *testing.T, stream, seq uint64, at int64, flow uint32, size, where uint16, change byte) {
		b := make([]byte, min(max(int(size), HeaderLen), MaxPayload))
		h := Header{Stream: stream, Seq: seq, SentAt: at, Flow: flow}
		Encode(b, h)
		if got, err := Decode(b); got != h || err != nil {
			t.Fatalf("got %+v, %v, want %+v", got, err, h)
		}
		if change == 0 {
			return
		}
		b[int(where)%len(b)] ^= change
		if _, err := Decode(b); err == nil {
			t.Fatalf("byte %d changed by %02x unnoticed", int(where)%len(b), change)
		}
	})
}
