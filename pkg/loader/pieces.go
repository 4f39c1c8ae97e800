package loader

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"xdpcast/internal/account"
)

// pieces maps an array map (BPF_F_MMAPABLE) into memory piece by piece: what is mapped is resident at once (remap_vmalloc_range
// in kernel/bpf/arraymap.c). It is not for concurrent use; the memory is.
type pieces struct {
	of     *ebpf.Map
	size   int
	mapped map[int][]byte // by number
}

// piecesOf returns the pieces of a map, none of them mapped. The caller must Close them, and may close the map.
func piecesOf(m *ebpf.Map) (*pieces, error) {
	of, err := m.Clone()
	if err != nil {
		return nil, fmt.Errorf("map into memory: %w", err)
	}
	return &pieces{of: of, size: int(m.MaxEntries()) * int(m.ValueSize()), mapped: map[int][]byte{}}, nil
}

// Size implements account.Memory.
func (p *pieces) Size() int { return p.size }

// Piece implements account.Memory. It may be called again for a piece.
func (p *pieces) Piece(number int) ([]byte, error) {
	begin := number * account.PieceSize
	size := min(p.size-begin, account.PieceSize)
	if piece := p.mapped[number]; piece != nil {
		return piece[:size], nil
	}
	page := os.Getpagesize()
	piece, err := unix.Mmap(p.of.FD(), int64(begin), (size+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map into memory: %w", err)
	}
	p.mapped[number] = piece
	return piece[:size], nil
}

// Close unmaps all pieces.
func (p *pieces) Close() error {
	errs := []error{p.of.Close()}
	for _, piece := range p.mapped {
		errs = append(errs, unix.Munmap(piece))
	}
	clear(p.mapped)
	return errors.Join(errs...)
}
