package history

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"xdpcast/internal/savefile"
)

// Digest identifies the text of a set: its SHA-256 in hexadecimal.
type Digest string

// Sum returns the digest of a text.
func Sum(text []byte) Digest {
	sum := sha256.Sum256(text)
	return Digest(hex.EncodeToString(sum[:]))
}

func (d Digest) valid() bool {
	raw, err := hex.DecodeString(string(d))
	return err == nil && len(raw) == sha256.Size && strings.ToLower(string(d)) == string(d)
}

const suffix = ".yaml.gz"

// maxText limits the unpacked size of a set, in bytes: several times what the daemon accepts.
const maxText = 1 << 28

// Part is a part of the text of a set, of which the others may be the same as in another set: it is
// compressed once, for all sets of which it is a part. Text is not modified.
type Part struct {
	Text   []byte
	packed []byte // a member of a gzip file (RFC 1952); nil: not yet
}

// SumParts is Sum of the concatenated parts.
func SumParts(parts []*Part) Digest {
	hash := sha256.New()
	for _, p := range parts {
		hash.Write(p.Text) // never fails
	}
	return Digest(hex.EncodeToString(hash.Sum(nil)))
}

// Put stores a text, unless it exists, and returns its digest. Save removes it again unless the
// state references it.
func (s *Store) Put(text []byte) (Digest, error) { return s.PutParts([]*Part{{Text: text}}) }

// PutParts is Put for the concatenated parts.
func (s *Store) PutParts(parts []*Part) (Digest, error) {
	if s.failWrites != nil {
		return "", s.failWrites
	}
	digest := SumParts(parts)
	if info, err := os.Lstat(s.path(digest)); err == nil && info.Mode().IsRegular() {
		if s.good[digest] && info.Size() == s.sizes[digest] {
			return digest, nil
		}
		if _, err := s.Get(digest); err == nil {
			return digest, nil
		}
	}
	if err := PackParts(parts); err != nil {
		return "", err
	}
	size := int64(0)
	packed := make([][]byte, len(parts))
	for i, p := range parts {
		packed[i] = p.packed
		size += int64(len(p.packed))
	}
	sizes, err := s.known()
	if err == nil {
		err = savefile.WriteParts(s.path(digest), packed)
	}
	if err == nil {
		sizes[digest] = size
		s.good[digest] = true
	}
	return digest, err
}

// PackParts compresses the parts of a text, unless that was done before, for a later PutParts.
func PackParts(parts []*Part) error {
	var w *gzip.Writer
	for _, p := range parts {
		if p.packed != nil {
			continue
		}
		var packed bytes.Buffer
		if w == nil {
			var err error
			if w, err = gzip.NewWriterLevel(&packed, gzip.BestSpeed); err != nil {
				return err
			}
		}
		w.Reset(&packed)
		if _, err := w.Write(p.Text); err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		p.packed = bytes.Clone(packed.Bytes())
	}
	return nil
}

// Get returns the text of a set; ErrDamaged if it differs from what was put in.
func (s *Store) Get(digest Digest) ([]byte, error) {
	f, err := os.Open(s.path(digest))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", s.path(digest), ErrDamaged, err)
	}
	text, err := io.ReadAll(io.LimitReader(r, maxText))
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", s.path(digest), ErrDamaged, err)
	}
	if Sum(text) != digest {
		return nil, fmt.Errorf("%s: %w: it holds another set", s.path(digest), ErrDamaged)
	}
	return text, nil
}

// known returns the size of each stored set, in bytes on disk. The directory is read once.
func (s *Store) known() (map[Digest]int64, error) {
	if s.sizes == nil {
		sizes, err := s.list()
		if err != nil {
			return nil, err
		}
		s.sizes = sizes
	}
	return s.sizes, nil
}

// list lists the stored sets, and removes half-written files of a dead process.
func (s *Store) list() (map[Digest]int64, error) {
	sizes := map[Digest]int64{}
	files, err := os.ReadDir(s.sets)
	if errors.Is(err, os.ErrNotExist) {
		return sizes, nil
	}
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if name, ok := strings.CutSuffix(f.Name(), suffix+".next"); ok && Digest(name).valid() {
			savefile.Discard(s.path(Digest(name)))
			continue
		}
		name, ok := strings.CutSuffix(f.Name(), suffix)
		if !ok || !Digest(name).valid() {
			continue
		}
		if info, err := f.Info(); err == nil {
			sizes[Digest(name)] = info.Size()
		}
	}
	return sizes, nil
}
