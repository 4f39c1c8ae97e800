package rules

import "testing"

// TestDSCPNames holds the values against the tables of RFC 2474 (cs), RFC 2597
// (af), RFC 3246 (ef), RFC 5865 (voice-admit) and RFC 8622 (le), in binary as
// they stand there.
func TestDSCPNames(t *testing.T) {
	names := map[string]int{
		"be": 0b000000, "default": 0b000000, "le": 0b000001, "voice-admit": 0b101100, "ef": 0b101110,
		"cs0": 0b000000, "cs1": 0b001000, "cs2": 0b010000, "cs3": 0b011000, "cs4": 0b100000, "cs5": 0b101000, "cs6": 0b110000, "cs7": 0b111000,
		"af11": 0b001010, "af12": 0b001100, "af13": 0b001110,
		"af21": 0b010010, "af22": 0b010100, "af23": 0b010110,
		"af31": 0b011010, "af32": 0b011100, "af33": 0b011110,
		"af41": 0b100010, "af42": 0b100100, "af43": 0b100110,
	}
	for name, want := range names {
		o, err := ParseOutput("239.1.1.1:5%e,dscp=" + name)
		if err != nil || int(o.Policy.DSCPValue) != want || o.Policy.DSCP != DSCPSet {
			t.Errorf("%s: %+v, %v; want %d", name, o.Policy, err, want)
		}
	}
	for v := range uint8(64) {
		name := dscpName(v)
		o := mustOutput(t, "239.1.1.1:5%e,dscp="+name)
		if o.Policy.DSCPValue != v {
			t.Errorf("%d is written %s, read %d", v, name, o.Policy.DSCPValue)
		}
		if _, named := names[name]; !named {
			for n, value := range names {
				if value == int(v) {
					t.Errorf("%d is written %s, not %s", v, name, n)
				}
			}
		}
	}
}

func TestEnumStrings(t *testing.T) {
	for got, want := range map[string]string{
		SourceInterface.String(): "iface", SourceKeep.String(): "keep", SourceAddress.String(): "address", SourcePolicy(9).String(): "SourcePolicy(9)",
		TTLDecrement.String(): "dec", TTLSet.String(): "set", TTLPolicy(9).String(): "TTLPolicy(9)",
		DSCPPolicy(9).String(): "DSCPPolicy(9)", ChecksumUpdate.String(): "update", ChecksumZero.String(): "zero", ChecksumPolicy(9).String(): "ChecksumPolicy(9)",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
