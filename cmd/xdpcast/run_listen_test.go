package main

import (
	"errors"
	"net"
	"strings"
	"testing"
)

// TestListenFlags: what --listen does not take is said before anything in the kernel is touched.
func TestListenFlags(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, tt := range []struct {
		args, want string
		code       int
	}{
		{"--tls-cert x", "--tls-cert without --listen: want an address to listen on", exitUsage},
		{"--listen-public", "--listen-public without --listen", exitUsage},
		{"--listen 0.0.0.0:9464", "want TLS (--tls-cert and --tls-key), or --listen-public", exitUsage},
		{"--listen 9464", "want HOST:PORT, such as 127.0.0.1:9464", exitUsage},
		{"--listen 127.0.0.1:0 --tls-cert x", "one of the two files is missing", exitUsage},
		{"--metrics-rules (", "--metrics-rules: rules \"(\": want all, active, none, or a regular expression", exitUsage},
		{"--listen 192.0.2.1:9464 --listen-public", "no interface that is up has this address here", exitFailed},
		{"--listen " + taken.Addr().String(), "address already in use", exitFailed},
	} {
		dir := t.TempDir()
		args := append([]string{"--socket", dir + "/s", "run", "--pin-dir", dir + "/pins", "--run-dir", dir}, strings.Fields(tt.args)...)
		if got := call("", args...); got.code != tt.code || !strings.Contains(got.stderr, tt.want) {
			t.Errorf("%s: %+v, want code %d with %q", tt.args, got, tt.code, tt.want)
		}
	}
}

// TestSecretsArePassedOn: what only root may read reaches the next daemon, and is the first error of one
// that has it from nobody.
func TestSecretsArePassedOn(t *testing.T) {
	first := &listenConfig{token: "0123456789abcdef"}
	file, err := first.pass()
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("permission denied")
	next := &listenConfig{tokenFile: "token", unread: refused}
	if err := next.receive(file); err != nil || next.token != first.token {
		t.Errorf("token %q, %v", next.token, err)
	}
	for _, alone := range []*listenConfig{{tokenFile: "token", unread: refused}, {certFile: "cert", keyFile: "key", unread: refused}} {
		if err := alone.receive(nil); !errors.Is(err, refused) {
			t.Errorf("%+v without a previous daemon: %v", alone, err)
		}
	}
	// Without a certificate of the previous daemon.
	if file, err = first.pass(); err != nil {
		t.Fatal(err)
	}
	if err := (&listenConfig{certFile: "cert", keyFile: "key", unread: refused}).receive(file); !errors.Is(err, refused) {
		t.Errorf("no certificate: %v", err)
	}
	// A token that can be read is the one to use.
	if file, err = first.pass(); err != nil {
		t.Fatal(err)
	}
	renewed := &listenConfig{tokenFile: "token", token: "fedcba9876543210"}
	if err := renewed.receive(file); err != nil || renewed.token != "fedcba9876543210" {
		t.Errorf("token %q, %v", renewed.token, err)
	}
	if file, err := (&listenConfig{}).pass(); file != nil || err != nil {
		t.Errorf("nothing to pass on: %v, %v", file, err)
	}
}
