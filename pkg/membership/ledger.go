package membership

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// ledger is a memory file that records the memberships of each helper socket: the kernel answers
// whether a socket holds a group, but cannot list its groups. A record is written before its join
// and erased after its leave, so that the ledger never lacks a membership of a socket, whenever the
// process dies.
//
// The format, all numbers in host byte order: a header of 64 bytes (the magic, version and record
// size as uint32, the number of records as uint64), then records of 64 bytes. A record of zeros is
// free. No record crosses a page, and the kernel copies one write within a page without checking
// for signals: no record is half written.
type ledger struct {
	fd   int
	size int // records
	free []int
}

const (
	ledgerMagic   = "xdpcast groups\x00\x00"
	ledgerVersion = 1
	ledgerRecord  = 64 // bytes; the header has the same size
	ledgerGrowth  = 256
	// ledgerMax limits what is read: a membership of every IPv4 group is more than a host can hold.
	ledgerMax = 1 << 24
)

// holding is one record: which socket holds which membership.
type holding struct {
	cookie uint64 // SO_COOKIE
	layer  int    // see poolKey
	index  int    // interface index
	group  netip.Addr
	source netip.Addr // the zero Addr: any
	since  time.Time
	slot   int // number of the record
}

func (h *holding) membership() Membership {
	return Membership{Index: h.index, Group: h.group, Source: h.source}
}

// newLedger makes an empty ledger.
func newLedger() (*ledger, error) {
	fd, err := unix.MemfdCreate("xdpcast-memberships", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	l := &ledger{fd: fd}
	if err := l.grow(); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return l, nil
}

// openLedger reads the ledger of another process, and checks all of it. It takes ownership of fd if
// there is no error.
func openLedger(fd int) (*ledger, []holding, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, nil, fmt.Errorf("fstat: %w", err)
	}
	if st.Size < ledgerRecord || st.Size%ledgerRecord != 0 || st.Size/ledgerRecord-1 > ledgerMax {
		return nil, nil, fmt.Errorf("it has %d bytes, want records of %d after a header of as many", st.Size, ledgerRecord)
	}
	data := make([]byte, st.Size)
	if n, err := unix.Pread(fd, data, 0); err != nil || n != len(data) {
		return nil, nil, fmt.Errorf("read %d of %d bytes: %w", n, len(data), err)
	}
	held, free, err := parseLedger(data)
	if err != nil {
		return nil, nil, err
	}
	return &ledger{fd: fd, size: len(data)/ledgerRecord - 1, free: free}, held, nil
}

// parseLedger returns the records, and the numbers of the free ones.
func parseLedger(data []byte) (held []holding, free []int, err error) {
	if string(data[:len(ledgerMagic)]) != ledgerMagic {
		return nil, nil, errors.New("it has the wrong magic")
	}
	header := data[len(ledgerMagic):]
	version, record, size := binary.NativeEndian.Uint32(header), binary.NativeEndian.Uint32(header[4:]), binary.NativeEndian.Uint64(header[8:])
	records := data[ledgerRecord:]
	switch {
	case version != ledgerVersion:
		return nil, nil, fmt.Errorf("it has version %d, this xdpcast reads %d", version, ledgerVersion)
	case record != ledgerRecord:
		return nil, nil, fmt.Errorf("its records have %d bytes, want %d", record, ledgerRecord)
	case size > uint64(len(records)/ledgerRecord):
		return nil, nil, fmt.Errorf("it has %d records, want %d", len(records)/ledgerRecord, size)
	}
	for slot := range len(records) / ledgerRecord {
		raw := [ledgerRecord]byte(records[slot*ledgerRecord:])
		if raw == ([ledgerRecord]byte{}) {
			free = append(free, slot)
			continue
		}
		h, err := decodeHolding(&raw)
		if err != nil {
			return nil, nil, fmt.Errorf("record %d: %w", slot, err)
		}
		h.slot = slot
		held = append(held, h)
	}
	return held, free, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Offsets in a record.
const (
	atCookie = 0
	atIndex  = 8
	atLayer  = 12
	atFamily = 14 // 4 or 6
	atSource = 15 // 1: one source
	atSince  = 16 // Unix time in nanoseconds
	atGroup  = 24
	atFrom   = 40
	atSum    = 60 // CRC-32C of the preceding bytes
)

func encodeHolding(h *holding) (raw [ledgerRecord]byte) {
	binary.NativeEndian.PutUint64(raw[atCookie:], h.cookie)
	binary.NativeEndian.PutUint32(raw[atIndex:], uint32(h.index))
	binary.NativeEndian.PutUint16(raw[atLayer:], uint16(h.layer))
	binary.NativeEndian.PutUint64(raw[atSince:], uint64(h.since.UnixNano()))
	raw[atFamily] = 6
	if h.group.Is4() {
		raw[atFamily] = 4
	}
	copy(raw[atGroup:atFrom], h.group.AsSlice())
	if h.source.IsValid() {
		raw[atSource] = 1
		copy(raw[atFrom:atSum], h.source.AsSlice())
	}
	binary.NativeEndian.PutUint32(raw[atSum:], crc32.Checksum(raw[:atSum], castagnoli))
	return raw
}

func decodeHolding(raw *[ledgerRecord]byte) (h holding, err error) {
	if sum := binary.NativeEndian.Uint32(raw[atSum:]); sum != crc32.Checksum(raw[:atSum], castagnoli) {
		return h, errors.New("its checksum is wrong")
	}
	h = holding{
		cookie: binary.NativeEndian.Uint64(raw[atCookie:]),
		index:  int(binary.NativeEndian.Uint32(raw[atIndex:])),
		layer:  int(binary.NativeEndian.Uint16(raw[atLayer:])),
		since:  time.Unix(0, int64(binary.NativeEndian.Uint64(raw[atSince:]))),
	}
	length := 16
	switch raw[atFamily] {
	case 4:
		length = 4
	case 6:
	default:
		return h, fmt.Errorf("address family %d, want 4 or 6", raw[atFamily])
	}
	h.group, _ = netip.AddrFromSlice(raw[atGroup : atGroup+length])
	if raw[atSource] != 0 {
		h.source, _ = netip.AddrFromSlice(raw[atFrom : atFrom+length])
	}
	if err := h.membership().validate(); err != nil {
		return h, err
	}
	if (h.layer == anySource) != !h.source.IsValid() {
		return h, fmt.Errorf("layer %d and source %v", h.layer, h.source)
	}
	if encodeHolding(&h) != *raw {
		return h, errors.New("it has more than a record holds")
	}
	return h, nil
}

// add writes a record and returns its number.
func (l *ledger) add(h *holding) (slot int, err error) {
	if h.layer > math.MaxUint16 {
		return -1, fmt.Errorf("layer %d is more than %d", h.layer, math.MaxUint16)
	}
	if len(l.free) == 0 {
		if err := l.grow(); err != nil {
			return -1, err
		}
	}
	slot = l.free[len(l.free)-1]
	raw := encodeHolding(h)
	if err := l.write(raw[:], slot+1); err != nil {
		return -1, err
	}
	l.free = l.free[:len(l.free)-1]
	return slot, nil
}

func (l *ledger) erase(slot int) error {
	if err := l.write(make([]byte, ledgerRecord), slot+1); err != nil {
		return err
	}
	l.free = append(l.free, slot)
	return nil
}

// grow makes room for more records: first the file, then the count in the header, which is a lower
// bound of the file's length.
func (l *ledger) grow() error {
	size := l.size + ledgerGrowth
	if size > ledgerMax {
		return fmt.Errorf("%d records are too many", size)
	}
	if err := unix.Ftruncate(l.fd, int64(size+1)*ledgerRecord); err != nil {
		return fmt.Errorf("ftruncate: %w", err)
	}
	var header [ledgerRecord]byte
	copy(header[:], ledgerMagic)
	binary.NativeEndian.PutUint32(header[len(ledgerMagic):], ledgerVersion)
	binary.NativeEndian.PutUint32(header[len(ledgerMagic)+4:], ledgerRecord)
	binary.NativeEndian.PutUint64(header[len(ledgerMagic)+8:], uint64(size))
	if err := l.write(header[:], 0); err != nil {
		return err
	}
	for slot := size - 1; slot >= l.size; slot-- {
		l.free = append(l.free, slot)
	}
	l.size = size
	return nil
}

// write writes record number at, the header being 0.
func (l *ledger) write(raw []byte, at int) error {
	n, err := unix.Pwrite(l.fd, raw, int64(at)*ledgerRecord)
	if err == nil && n != len(raw) {
		err = unix.EIO
	}
	if err != nil {
		return fmt.Errorf("write record %d: %w", at-1, err)
	}
	return nil
}

func (l *ledger) close() error { return unix.Close(l.fd) }
