package main

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func TestBuild(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "binary")
	if err := os.WriteFile(binary, bytes.Repeat([]byte("xdpcast "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	o := options{arch: "arm64", version: "1.2.3", commit: "abc", made: time.Unix(1_700_000_000, 0).UTC()}
	specs := []string{"/usr/bin/xdpcast=" + binary + ":755", "/var/lib/xdpcast/", "/etc/xdpcast/rules.yaml=" + binary}
	var archives [2][]byte
	for i := range archives {
		o.out = filepath.Join(dir, "image.tar")
		if err := run(o, specs); err != nil {
			t.Fatal(err)
		}
		var err error
		if archives[i], err = os.ReadFile(o.out); err != nil {
			t.Fatal(err)
		}
		slices.Reverse(specs)
		// File times are not part of the image.
		if err := os.Chtimes(binary, time.Now(), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two of the same files differ")
	}

	image, err := tarball.ImageFromPath(o.out, nil) // as docker load reads it
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(image); err != nil {
		t.Error(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Architecture != "arm64" || config.OS != "linux" || !config.Created.Time.Equal(o.made) || config.Config.Labels["org.opencontainers.image.version"] != "1.2.3" ||
		!slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/xdpcast"}) {
		t.Errorf("config %+v", config)
	}
	layers, err := image.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("layers %v, %v", layers, err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := map[string]int64{}
	for content := tar.NewReader(r); ; {
		h, err := content.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(o.made) {
			t.Errorf("%s: %+v", h.Name, h)
		}
		got[h.Name] = h.Mode
	}
	want := map[string]int64{
		"etc/": 0o755, "etc/xdpcast/": 0o755, "etc/xdpcast/rules.yaml": 0o644, "usr/": 0o755, "usr/bin/": 0o755, "usr/bin/xdpcast": 0o755,
		"var/": 0o755, "var/lib/": 0o755, "var/lib/xdpcast/": 0o755,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("files (-want, +got):\n%s", d)
	}
	for _, bad := range []string{"usr/bin/x=" + binary, "/usr/bin/x=/absent", "/usr/bin/x=" + binary + ":9"} {
		if err := run(o, []string{bad}); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}
