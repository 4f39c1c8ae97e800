// Image makes a container image from files, without a container engine: one layer, as an archive
// that is an OCI image layout (image-spec 1.1) and, by its manifest.json, readable by "docker
// load". The same files and time give the same archive.
//
//	image -o FILE -arch ARCH -version VERSION -commit COMMIT [-time SECONDS] PATH=FILE[:MODE]...
//
// A PATH that ends in / is an empty directory.
package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

type options struct {
	out, arch, version, commit string
	made                       time.Time
}

func main() {
	var o options
	flag.StringVar(&o.out, "o", "", "`FILE` to write")
	flag.StringVar(&o.arch, "arch", "", "`ARCH` of the binary, as Go names it")
	flag.StringVar(&o.version, "version", "", "of the program")
	flag.StringVar(&o.commit, "commit", "", "that it was built from")
	seconds := flag.Int64("time", 0, "when it was made, in `SECONDS` since 1970")
	flag.Parse()
	if o.out == "" || o.arch == "" || o.version == "" || flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	o.made = time.Unix(*seconds, 0).UTC()
	if err := run(o, flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

func run(o options, files []string) error {
	image, err := build(o, files)
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := write(&archive, o, image); err != nil {
		return err
	}
	return os.WriteFile(o.out, archive.Bytes(), 0o644)
}

// build makes the image.
func build(o options, files []string) (v1.Image, error) {
	content, err := layer(o.made, files)
	if err != nil {
		return nil, err
	}
	opener := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }
	packed, err := tarball.LayerFromOpener(opener, tarball.WithMediaType(types.OCILayer), tarball.WithCompression(compression.GZip), tarball.WithCompressionLevel(9))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.Append(image, mutate.Addendum{
		Layer: packed, MediaType: types.OCILayer, History: v1.History{Created: v1.Time{Time: o.made}, CreatedBy: "xdpcast packaging/image"},
	}); err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", o.arch, v1.Time{Time: o.made}
	config.Config = v1.Config{
		Entrypoint: []string{"/usr/bin/xdpcast"},
		Cmd:        []string{"run", "-c", "/etc/xdpcast/rules.yaml", "--watch-config"},
		Env:        []string{"PATH=/usr/bin"},
		WorkingDir: "/",
		Labels:     labels(o),
	}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return nil, err
	}
	return mutate.Annotations(image, labels(o)).(v1.Image), nil
}

// labels are the annotations that the image specification names.
func labels(o options) map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "xdpcast",
		"org.opencontainers.image.description": "multicast relay in the Linux kernel",
		"org.opencontainers.image.version":     o.version,
		"org.opencontainers.image.revision":    o.commit,
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.created":     o.made.Format(time.RFC3339),
	}
}

// layer returns the archive of the files and their directories.
func layer(made time.Time, files []string) ([]byte, error) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	there := map[string]bool{"": true, ".": true, "/": true}
	header := func(name string, mode, size int64) error {
		kind := byte(tar.TypeReg)
		if strings.HasSuffix(name, "/") {
			kind = tar.TypeDir
		}
		return w.WriteHeader(&tar.Header{
			Typeflag: kind, Name: strings.TrimPrefix(name, "/"), Mode: mode, Size: size, ModTime: made, Format: tar.FormatPAX,
		})
	}
	var directories func(dir string) error
	directories = func(dir string) error {
		if there[dir] {
			return nil
		}
		there[dir] = true
		return errors.Join(directories(path.Dir(dir)), header(dir+"/", 0o755, 0))
	}
	for _, spec := range slices.Sorted(slices.Values(files)) {
		name, from, ok := strings.Cut(spec, "=")
		if !path.IsAbs(name) {
			return nil, fmt.Errorf("%q: want an absolute path", spec)
		}
		if !ok {
			if err := directories(path.Clean(name)); err != nil {
				return nil, err
			}
			continue
		}
		from, octal, _ := strings.Cut(from, ":")
		mode, err := strconv.ParseInt(octal, 8, 16)
		if err != nil && octal != "" {
			return nil, fmt.Errorf("%q: mode %q: want octal digits", spec, octal)
		}
		if octal == "" {
			mode = 0o644
		}
		data, err := os.ReadFile(from)
		if err == nil {
			err = errors.Join(directories(path.Dir(name)), header(name, mode, int64(len(data))))
		}
		if err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	return archive.Bytes(), w.Close()
}

// write writes the image as an archive.
func write(out io.Writer, o options, image v1.Image) error {
	manifest, err := image.RawManifest()
	if err != nil {
		return err
	}
	config, err := image.RawConfigFile()
	if err != nil {
		return err
	}
	configName, err := image.ConfigName()
	if err != nil {
		return err
	}
	digest, err := image.Digest()
	if err != nil {
		return err
	}
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{{
		MediaType: types.OCIManifestSchema1, Size: int64(len(manifest)), Digest: digest,
		Platform:    &v1.Platform{OS: "linux", Architecture: o.arch},
		Annotations: map[string]string{"org.opencontainers.image.ref.name": o.version, "io.containerd.image.name": "docker.io/library/xdpcast:" + o.version},
	}}}
	files := map[string][]byte{
		"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), blob(digest): manifest, blob(configName): config,
	}
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	var names []string
	for _, l := range layers {
		if err := addLayer(files, &names, l); err != nil {
			return err
		}
	}
	docker := []map[string]any{{"Config": blob(configName), "RepoTags": []string{"xdpcast:" + o.version}, "Layers": names}}
	if files["index.json"], err = json.Marshal(index); err != nil {
		return err
	}
	if files["manifest.json"], err = json.Marshal(docker); err != nil {
		return err
	}
	return writeFiles(out, o.made, files)
}

func blob(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

func addLayer(files map[string][]byte, names *[]string, l v1.Layer) error {
	digest, err := l.Digest()
	if err != nil {
		return err
	}
	r, err := l.Compressed()
	if err != nil {
		return err
	}
	defer r.Close()
	*names = append(*names, blob(digest))
	files[blob(digest)], err = io.ReadAll(r)
	return err
}

func writeFiles(out io.Writer, made time.Time, files map[string][]byte) error {
	w := tar.NewWriter(out)
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: made}); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(files[name])), ModTime: made}); err != nil {
			return err
		}
		if _, err := w.Write(files[name]); err != nil {
			return err
		}
	}
	return w.Close()
}
