package membership

import (
	"maps"
	"os"
	"testing"

	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

func TestParseIGMPVersions(t *testing.T) {
	const title = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n"
	for _, c := range []struct {
		name, table string
		want        map[int]int // nil: an error
	}{
		{"no interface", title, map[int]int{}},
		{"nothing", "", map[int]int{}},
		{
			"three interfaces", title +
				"1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n" +
				"2\teth0      :     2      V2\n\t\t\t\t010101EF     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n" +
				"13\tabcdefghijklmno:     1      V1\n",
			map[int]int{1: 3, 2: 2, 13: 1},
		},
		{"no version", "1\tlo        :     1\n", nil},
		{"version 4", "1\tlo        :     1      V4\n", nil},
		{"no number", "1\tlo        :     1      V\n", nil},
		{"index only", "1\n", nil},
		{"index too large", "99999999999999999999\tlo : 1 V3\n", nil},
	} {
		got, err := parseIGMPVersions([]byte(c.table))
		if (err != nil) != (c.want == nil) || !maps.Equal(got, c.want) {
			t.Errorf("%s: %v, %v, want %v", c.name, got, err, c.want)
		}
	}
}

func FuzzParseIGMPVersions(f *testing.F) {
	f.Add([]byte("Idx\tDevice\n2\teth0      :     2      V2\n\t\t\t\t010101EF     1 0:00000000\t\t0\n"))
	f.Fuzz(func(t *testing.T, table []byte) {
		versions, err := parseIGMPVersions(table)
		if err != nil {
			return
		}
		for index, version := range versions {
			if index < 0 || version < 1 || version > 3 {
				t.Errorf("interface %d has version %d", index, version)
			}
		}
	})
}

// The versions are those of the kernel, in the namespace of the calling thread.
func TestVersionsOfKernel(t *testing.T) {
	h, peer := labtest.Host(t, "mbr"), labtest.Host(t, "per")
	labtest.Connect(t, lab.End{Host: h, Name: "eth0", Addrs: []string{"10.0.0.1/24"}}, lab.End{Host: peer, Name: "eth0"})
	labtest.Enter(t, h)
	link, err := h.Link("eth0")
	if err != nil {
		t.Fatal(err)
	}
	set := func(key, value string) {
		t.Helper()
		if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		forced string
		want   int
	}{{"0", 3}, {"2", 2}, {"1", 1}} {
		set("ipv4/conf/eth0/force_igmp_version", c.forced)
		versions, err := IGMPVersions()
		if err != nil || versions[link.Attrs().Index] != c.want {
			t.Errorf("force_igmp_version %s: %v, %v, want %d", c.forced, versions, err, c.want)
		}
	}
	for _, c := range []struct {
		forced  string
		hearsV1 bool
		want    int
	}{{"0", false, 2}, {"0", true, 1}, {"1", false, 1}, {"2", true, 2}} {
		set("ipv6/conf/eth0/force_mld_version", c.forced)
		if got := MLDVersion("eth0", c.hearsV1); got != c.want {
			t.Errorf("force_mld_version %s, MLDv1 heard %t: %d, want %d", c.forced, c.hearsV1, got, c.want)
		}
	}
	if got := MLDVersion("absent", false); got != 2 {
		t.Errorf("interface that is absent: %d, want 2", got)
	}
}
