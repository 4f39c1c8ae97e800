package rules_test

import (
	"errors"
	"fmt"

	"xdpcast/pkg/rules"
)

func ExampleParseInput() {
	in, _, err := rules.ParseInput("10.0.0.5@239.1.1.1:5000%eth0")
	fmt.Println(in.Source, in.Address, in.Port, in.Interface, err)

	_, _, err = rules.ParseInput("239.1.1.1:0%eth0")
	fmt.Println(err)
	// Output:
	// 10.0.0.5 239.1.1.1 5000 eth0 <nil>
	// input "239.1.1.1:0%eth0": port "0": want 1 to 65535, or no ':' for any port
}

func ExampleParseOutput() {
	out, err := rules.ParseOutput("239.2.2.2:6000%eth1,dscp=34,ttl=8,src=iface")
	fmt.Println(out, err) // canonical: in order, by name, defaults left out

	_, err = rules.ParseOutput("239.2.2.2:70000%eth1")
	fmt.Println(err)
	// Output:
	// 239.2.2.2:6000%eth1,ttl=8,dscp=af41 <nil>
	// output "239.2.2.2:70000%eth1": port "70000": want 1 to 65535, +N or -N to shift the packet's, or no ':' to keep it
}

func ExampleParseFile() {
	set, err := rules.ParseFile("cameras.yaml", []byte(`
rules:
  - name: cam1
    in: 10.0.0.5@239.1.1.1:5000%eth0
    out: [239.2.2.2:6000%eth1, "10.0.9.9:6000%eth2,ttl=16"]
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, r := range set {
		fmt.Println(r)
	}
	// Output:
	// cam1 10.0.0.5@239.1.1.1:5000%eth0 -> 239.2.2.2:6000%eth1 10.0.9.9:6000%eth2,ttl=16
}

func ExampleParseFile_errors() {
	_, err := rules.ParseFile("cameras.yaml", []byte(`
rules:
  - name: cam1
    in: 239.1.1.1:5000%eth0
    out: 239.2.2.2:6000%eth1,ttl=300
  - name: cam1
    in: 239.1.1.1:5000%eth0
    output: 239.2.2.2:6000%eth1
`))
	fmt.Println(err)
	fmt.Println("an input twice:", errors.Is(err, rules.ErrDuplicateInput))
	// Output:
	// cameras.yaml:5: rule "cam1": output "239.2.2.2:6000%eth1,ttl=300": policy "ttl=300": want ttl=keep, ttl=dec or ttl=1 to 255
	// cameras.yaml:6: rule "cam1": out missing: write 1 to 64 outputs
	// cameras.yaml:6: rule "cam1": name "cam1": want a unique name: rule #1 (line 3) has it
	// cameras.yaml:7: rule "cam1": in "239.1.1.1:5000%eth0": want an input of its own: rule "cam1" (line 3) takes it
	// cameras.yaml:8: rule "cam1": unknown key "output": want name, in, out, path, merge, failover
	// an input twice: true
}

func ExampleCompute() {
	have, _ := rules.ParseFile("have", []byte(`rules:
- {name: cam1, in: 239.1.1.1:5000%eth0, out: 239.2.2.1:6000%eth1}
- {name: cam2, in: 239.1.1.2:5000%eth0, out: 239.2.2.2:6000%eth1}
- {name: cam3, in: 239.1.1.3:5000%eth0, out: 239.2.2.3:6000%eth1}
`))
	want, _ := rules.ParseFile("want", []byte(`rules:
- {name: cam1, in: 239.1.1.1:5000%eth0, out: 239.2.2.1:6000%eth1}
- {name: cam3, in: 239.1.1.3:5000%eth0, out: "239.2.2.3:6000%eth1,ttl=8"}
- {name: cam4, in: 239.1.1.4:5000%eth0, out: 239.2.2.4:6000%eth1}
`))
	fmt.Print(rules.Compute(have, want))
	// Output:
	// - cam2
	// ~ cam3 out -239.2.2.3:6000%eth1 +239.2.2.3:6000%eth1,ttl=8
	// + cam4 239.1.1.4:5000%eth0 -> 239.2.2.4:6000%eth1
}

func ExampleWinner() {
	one, _, _ := rules.ParseInput("10.0.0.5@239.1.1.1:5000%eth0")
	all, _, _ := rules.ParseInput("239.1.1.1:5000%eth0")
	fmt.Println(rules.Winner(all, one))
	// Output: 10.0.0.5@239.1.1.1:5000%eth0 true
}
