package metrics

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/labtest"
)

// writeCertificate writes a certificate with a serial number, and its key.
func writeCertificate(t *testing.T, certFile, keyFile string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path+".next", pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".next", path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCertificateIsRenewed: a server uses a renewed certificate, and the previous one while the files are
// wrong, or must not be read.
func TestCertificateIsRenewed(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if _, err := OpenCertificate(certFile, ""); err == nil || !strings.Contains(err.Error(), "one of the two files is missing") {
		t.Errorf("a certificate without a key: %v", err)
	}
	if _, err := OpenCertificate(certFile, keyFile); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no files: %v", err)
	}
	writeCertificate(t, certFile, keyFile, 1)
	c, err := OpenCertificate(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	c.Log = slog.New(slog.NewTextHandler(&said, nil))
	ln, err := Listen("127.0.0.1:0", ListenOptions{Certificate: c})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, ln, http.NotFoundHandler(), &Busy{}, slog.New(slog.DiscardHandler))
	}()
	serial := func() int64 {
		t.Helper()
		conn, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{InsecureSkipVerify: true}) // its serial number is compared
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	lookAgain := func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.looked = time.Time{}
	}
	if got := serial(); got != 1 {
		t.Errorf("certificate %d, want 1", got)
	}
	writeCertificate(t, certFile, keyFile, 2)
	labtest.Eventually(t, "the renewed certificate is used", func() bool { return serial() == 2 })
	// Half of a renewal.
	writeCertificate(t, certFile, filepath.Join(dir, "other"), 3)
	lookAgain()
	if got := serial(); got != 2 || !strings.Contains(said.String(), "the previous one is kept") {
		t.Errorf("certificate %d with another key; said:\n%s", got, &said)
	}
	// A process that must not read the files has their contents from one that could.
	cert, key := c.PEM()
	passed, err := PassedCertificate(certFile, keyFile, cert, key)
	if err != nil {
		t.Fatal(err)
	}
	if got := passed.current().Leaf.SerialNumber.Int64(); got != 2 {
		t.Errorf("passed on: certificate %d, want 2", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
