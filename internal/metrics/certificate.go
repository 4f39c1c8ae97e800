package metrics

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Certificate is a server's certificate and its key, in two PEM files. They are read again when they
// change: certificates are renewed every few weeks, and daemons run for years. Its methods may be called
// from any goroutine.
type Certificate struct {
	// Log receives changes, and failures to read the files; nil discards them. Set it before the first
	// connection.
	Log *slog.Logger

	certFile, keyFile string

	mu        sync.Mutex
	pair      *tls.Certificate
	cert, key []byte // PEM
	signature string // of the files when they were read last
	looked    time.Time
}

// certificateAgain is the least interval of looking at the files.
const certificateAgain = time.Second

// OpenCertificate reads the files. The error matches fs.ErrPermission if this process must not.
func OpenCertificate(certFile, keyFile string) (*Certificate, error) {
	if certFile == "" || keyFile == "" {
		return nil, errors.New("TLS needs a certificate and a key: one of the two files is missing")
	}
	c := &Certificate{certFile: certFile, keyFile: keyFile, looked: time.Now()}
	c.signature = c.sign()
	return c, c.read()
}

// PassedCertificate is OpenCertificate for a process that must not read the files, and has their contents
// from one that could.
func PassedCertificate(certFile, keyFile string, cert, key []byte) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, looked: time.Now()}
	c.signature = c.sign()
	return c, c.set(cert, key)
}

// PEM returns the certificate and the key in use.
func (c *Certificate) PEM() (cert, key []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cert, c.key
}

// config uses the certificate for connections.
func (c *Certificate) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current(), nil }}
}

// current is the certificate in the files; the last good one while they cannot be read.
func (c *Certificate) current() *tls.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < certificateAgain {
		return c.pair
	}
	c.looked = time.Now()
	now := c.sign() // first: a change during the read is seen the next time
	if now == c.signature {
		return c.pair
	}
	c.signature = now
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := c.read(); err != nil {
		log.Warn("the TLS certificate has changed and cannot be used: the previous one is kept", "error", err)
	} else {
		log.Info("the TLS certificate was read again", "file", c.certFile)
	}
	return c.pair
}

func (c *Certificate) read() error {
	cert, err := os.ReadFile(c.certFile)
	if err != nil {
		return fmt.Errorf("TLS certificate: %w", err)
	}
	key, err := os.ReadFile(c.keyFile)
	if err != nil {
		return fmt.Errorf("key of the TLS certificate: %w", err)
	}
	return c.set(cert, key)
}

func (c *Certificate) set(cert, key []byte) error {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", c.certFile, c.keyFile, err)
	}
	c.pair, c.cert, c.key = &pair, cert, key
	return nil
}

// sign is a signature of the files' metadata.
func (c *Certificate) sign() (text string) {
	for _, path := range []string{c.certFile, c.keyFile} {
		info, err := os.Stat(path)
		if err != nil {
			text += err.Error() + "\n"
			continue
		}
		text += fmt.Sprintln(info.Size(), info.ModTime().UnixNano())
	}
	return text
}
