// Package kubernetes checks the Kubernetes files against Kubernetes' own types.
package kubernetes

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// decode decodes a document into a type, which must have all of its keys.
func decode[T any](t *testing.T, text []byte) T {
	t.Helper()
	var v T
	if err := strictly(text, &v); err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	return v
}

// strictly parses YAML as the API server does in strict mode: keys are case-sensitive, and unknown
// or duplicate ones are errors.
func strictly(text []byte, v any) error {
	data, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return err
	}
	faults, err := json.UnmarshalStrict(data, v)
	return errors.Join(err, errors.Join(faults...))
}

func TestManifest(t *testing.T) {
	text, err := os.ReadFile("xdpcast.yaml")
	if err != nil {
		t.Fatal(err)
	}
	version, err := os.ReadFile("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	documents := bytes.Split(text, []byte("\n---\n"))
	if len(documents) != 3 {
		t.Fatalf("%d documents, want 3", len(documents))
	}
	namespace := decode[corev1.Namespace](t, documents[0])
	rules := decode[corev1.ConfigMap](t, documents[1])
	set := decode[appsv1.DaemonSet](t, documents[2])
	for kind, got := range map[string]string{
		"v1 Namespace": namespace.APIVersion + " " + namespace.Kind, "v1 ConfigMap": rules.APIVersion + " " + rules.Kind,
		"apps/v1 DaemonSet": set.APIVersion + " " + set.Kind,
	} {
		if got != kind {
			t.Errorf("a document is %q, want %q", got, kind)
		}
	}
	if set.Namespace != namespace.Name || rules.Namespace != namespace.Name {
		t.Error("they are not in one namespace")
	}
	pod := set.Spec.Template.Spec
	for key, value := range set.Spec.Selector.MatchLabels {
		if set.Spec.Template.Labels[key] != value {
			t.Errorf("the set selects %s=%s, which its pods do not have", key, value)
		}
	}
	if !pod.HostNetwork || len(pod.Containers) != 1 {
		t.Fatalf("pod %+v", pod)
	}
	c := pod.Containers[0]
	if want := "xdpcast:" + strings.TrimSpace(string(version)); c.Image != want {
		t.Errorf("image %s, want %s", c.Image, want)
	}
	volumes := map[string]corev1.Volume{}
	for _, v := range pod.Volumes {
		volumes[v.Name] = v
	}
	mounted := map[string]string{}
	for _, m := range c.VolumeMounts {
		if _, ok := volumes[m.Name]; !ok {
			t.Errorf("volume %s is mounted and not there", m.Name)
		}
		mounted[m.MountPath] = m.Name
		delete(volumes, m.Name)
	}
	for name := range volumes {
		t.Errorf("volume %s is not mounted", name)
	}
	for _, path := range []string{"/etc/xdpcast", "/sys/fs/bpf", "/run/xdpcast", "/var/lib/xdpcast"} {
		if mounted[path] == "" {
			t.Errorf("nothing is mounted on %s", path)
		}
	}
	if _, ok := rules.Data["rules.yaml"]; !ok {
		t.Error("the ConfigMap has no rules.yaml, which the daemon reads")
	}
	listen := slices.Index(c.Args, "--listen")
	if listen < 0 || !slices.Contains(c.Args, "--watch-config") {
		t.Fatalf("arguments %q", c.Args)
	}
	for path, probe := range map[string]*corev1.Probe{"/readyz": c.ReadinessProbe, "/healthz": c.LivenessProbe} {
		if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Path != path || probe.HTTPGet.Host+":"+probe.HTTPGet.Port.String() != c.Args[listen+1] {
			t.Errorf("probe of %s is %+v, the daemon listens at %s", path, probe, c.Args[listen+1])
		}
	}
	if s := c.SecurityContext; s == nil || s.Privileged != nil || !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("security context %+v", s)
	}
}

// TestDecodeIsStrict: a key unknown to Kubernetes is found.
func TestDecodeIsStrict(t *testing.T) {
	var set appsv1.DaemonSet
	for _, text := range []string{"spec: {templates: {}}", "spec: {template: {spec: {hostnetwork: true}}}", "kind: DaemonSet\nkind: DaemonSet"} {
		if err := strictly([]byte(text), &set); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}
