package main

import (
	"encoding/json"
	"strings"
	"testing"

	"xdpcast/bpf"
)

func TestVersion(t *testing.T) {
	got := call("", "version", "-o", "json")
	var info versionInfo
	if err := json.Unmarshal([]byte(got.stdout), &info); err != nil || got.code != exitDone {
		t.Fatalf("%v: %+v", err, got)
	}
	if info.Schema != bpf.Schema || info.Kernel == "" || info.Go == "" || info.Arch == "" || info.Version == "" || info.Commit == "" {
		t.Errorf("%+v", info)
	}
	if got := call("", "version"); !strings.Contains(got.stdout, "kernel  "+info.Kernel+"\n") {
		t.Errorf("%+v", got)
	}
	if got := call("", "version", "x"); got.code != exitUsage {
		t.Errorf("%+v", got)
	}
}
