package main

import (
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
