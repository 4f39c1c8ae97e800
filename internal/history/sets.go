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

// Put stores a text, unless it exists, and returns its digest. Save removes it again unless the
// state references it.
func (s *Store) Put(text []byte) (Digest, error) {
	if s.failWrites != nil {
		return "", s.failWrites
	}
	digest := Sum(text)
	if info, err := os.Lstat(s.path(digest)); err == nil && info.Mode().IsRegular() {
		if _, err := s.Get(digest); err == nil {
			return digest, nil
		}
	}
	var packed bytes.Buffer
	w, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return "", err
	}
	if _, err := w.Write(text); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	return digest, savefile.Write(s.path(digest), packed.Bytes())
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

// sizes lists the stored sets, in bytes on disk, and removes half-written files of a dead process.
func (s *Store) sizes() (map[Digest]int64, error) {
	files, err := os.ReadDir(s.sets)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	sizes := map[Digest]int64{}
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
