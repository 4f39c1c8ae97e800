package tap

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
)

// Blocks and options of draft-ietf-opsawg-pcapng, in little endian.
const (
	blockSection    = 0x0a0d0d0a
	blockInterface  = 1
	blockStatistics = 5
	blockPacket     = 6

	byteOrder = 0x1a2b3c4d

	optComment     = 1
	optSectionOS   = 3
	optSectionApp  = 4
	optName        = 2
	optResolution  = 9
	optPacketFlags = 2
	optReceived    = 4
	optDropped     = 5

	linkEthernet = 1
	linkRaw      = 101

	directionIn  = 1
	directionOut = 2

	maxComment = 1000
	// writeBytes is the size of a write.
	writeBytes = 256 << 10
)

// pcapng collects blocks and writes them whole.
type pcapng struct {
	w     io.Writer
	buf   []byte
	block int // start of the current block
}

func (p *pcapng) flush() error {
	if len(p.buf) == 0 {
		return nil
	}
	_, err := p.w.Write(p.buf)
	p.buf = p.buf[:0]
	return err
}

func (p *pcapng) u16(v uint16) { p.buf = binary.LittleEndian.AppendUint16(p.buf, v) }
func (p *pcapng) u32(v uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, v) }

// time appends a time in nanoseconds, upper half first.
func (p *pcapng) time(ns int64) {
	p.u32(uint32(uint64(ns) >> 32))
	p.u32(uint32(ns))
}

func (p *pcapng) begin(kind uint32) {
	p.block = len(p.buf)
	p.u32(kind)
	p.u32(0)
}

// end writes the block's length at both of its ends.
func (p *pcapng) end() {
	n := uint32(len(p.buf) - p.block + 4)
	binary.LittleEndian.PutUint32(p.buf[p.block+4:], n)
	p.u32(n)
}

// padded appends bytes, padded to a multiple of 4.
func (p *pcapng) padded(data []byte) {
	p.buf = append(p.buf, data...)
	for range -len(data) & 3 {
		p.buf = append(p.buf, 0)
	}
}

func (p *pcapng) option(code uint16, value []byte) {
	p.u16(code)
	p.u16(uint16(len(value)))
	p.padded(value)
}

func (p *pcapng) endOfOptions() { p.u32(0) }

func (p *pcapng) section(application string) {
	p.begin(blockSection)
	p.u32(byteOrder)
	p.u16(1)
	p.u16(0)
	p.u32(0xffffffff) // the section's length is not known
	p.u32(0xffffffff)
	p.option(optSectionOS, []byte(runtime.GOOS))
	p.option(optSectionApp, []byte(application))
	p.endOfOptions()
	p.end()
}

// device describes an interface; the first has id 0.
func (p *pcapng) device(name string, raw bool) {
	p.begin(blockInterface)
	if raw {
		p.u16(linkRaw)
	} else {
		p.u16(linkEthernet)
	}
	p.u16(0)
	p.u32(0) // no snap length
	p.option(optName, []byte(name))
	p.option(optResolution, []byte{9}) // 10^-9 s
	p.endOfOptions()
	p.end()
}

// packet writes a packet of length bytes, of which data was kept. comments have the format of
// appendComment.
func (p *pcapng) packet(device uint32, ns int64, out bool, length int, data, comments []byte) {
	p.begin(blockPacket)
	p.u32(device)
	p.time(ns)
	p.u32(uint32(len(data)))
	p.u32(uint32(length))
	p.padded(data)
	for len(comments) > 2 {
		n := int(binary.LittleEndian.Uint16(comments))
		p.option(optComment, comments[2:2+n])
		comments = comments[2+n:]
	}
	flags := uint32(directionIn)
	if out {
		flags = directionOut
	}
	p.option(optPacketFlags, binary.LittleEndian.AppendUint32(nil, flags))
	p.endOfOptions()
	p.end()
}

func (p *pcapng) statistics(device uint32, ns int64, written, lost uint64) {
	p.begin(blockStatistics)
	p.u32(device)
	p.time(ns)
	p.option(optReceived, binary.LittleEndian.AppendUint64(nil, written+lost))
	p.option(optDropped, binary.LittleEndian.AppendUint64(nil, lost))
	p.endOfOptions()
	p.end()
}

// Reader copies a Writer's file block by block, so that the copy ends between two blocks, and
// counts its packets.
type Reader struct {
	// Packets counts packets copied, Lost those that the tap could not keep.
	Packets, Lost uint64

	block []byte
}

// maxBlock bounds the length of a block, in bytes.
const maxBlock = 1 << 20

// Copy copies until from ends, which is io.EOF only between two blocks, or to fails. It flushes
// what has arrived before it waits for more.
func (r *Reader) Copy(to io.Writer, from io.Reader) error {
	in, out := bufio.NewReaderSize(from, writeBytes), bufio.NewWriterSize(to, writeBytes)
	for {
		if in.Buffered() == 0 {
			if err := out.Flush(); err != nil {
				return err
			}
		}
		var head [8]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return errors.Join(err, out.Flush())
		}
		n := binary.LittleEndian.Uint32(head[4:])
		if n < 12 || n > maxBlock || n%4 != 0 {
			return errors.Join(io.ErrUnexpectedEOF, out.Flush())
		}
		r.block = append(append(r.block[:0], head[:]...), make([]byte, n-8)...)
		if _, err := io.ReadFull(in, r.block[8:]); err != nil {
			return errors.Join(io.ErrUnexpectedEOF, out.Flush())
		}
		if _, err := out.Write(r.block); err != nil {
			return err
		}
		switch binary.LittleEndian.Uint32(head[:]) {
		case blockPacket:
			r.Packets++
		case blockStatistics:
			if n >= 24 {
				r.Lost = lostOf(r.block)
			}
		}
	}
}

// lostOf reads the option with the number of dropped packets.
func lostOf(block []byte) uint64 {
	options := block[20 : len(block)-4]
	for len(options) >= 4 {
		code, n := binary.LittleEndian.Uint16(options), int(binary.LittleEndian.Uint16(options[2:]))
		size := 4 + (n+3)&^3
		if size > len(options) {
			break
		}
		if code == optDropped && n == 8 {
			return binary.LittleEndian.Uint64(options[4:])
		}
		options = options[size:]
	}
	return 0
}
