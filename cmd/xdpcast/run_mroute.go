package main

import (
	"errors"

	"github.com/urfave/cli/v2"

	"xdpcast/pkg/rules"
)

// mrouteFlags are the flags of multicast route mirroring.
func mrouteFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "mroute", Usage: "forward by the kernel's multicast routes (of FRR, smcroute, pimd, igmpproxy) in XDP; like mroute in the file, which must then not have it"},
		&cli.StringSliceFlag{Name: "mroute-table", Usage: "mirror `TABLE`: main, or a number (repeatable)", DefaultText: "main"},
		&cli.StringSliceFlag{Name: "mroute-family", Usage: "mirror routes of `FAMILY`: ipv4 or ipv6 (repeatable)", DefaultText: "both"},
		&cli.StringSliceFlag{Name: "mroute-interface", Usage: "mirror only routes whose interfaces are all listed: `IFACE`, or a pattern (eth+; repeatable)", DefaultText: "any"},
		&cli.StringSliceFlag{Name: "mroute-group", Usage: "mirror only routes whose group is in `PREFIX` (repeatable)", DefaultText: "any"},
		&cli.StringSliceFlag{Name: "mroute-leave", Usage: "leave groups in `PREFIX` to the kernel (repeatable)"},
		&cli.StringFlag{Name: "mroute-joined", Usage: "`WHAT` to do with groups that a program on this host has joined on their input: leave them to the kernel, which gives the program a copy, or take them", Value: "leave"},
	}
}

// mrouteKeys are the flags that set keys of the mroute section of a file.
var mrouteKeys = []struct{ flag, key string }{
	{"mroute-table", "tables"}, {"mroute-family", "families"}, {"mroute-interface", "interfaces"},
	{"mroute-group", "groups"}, {"mroute-leave", "leave"}, {"mroute-joined", "joined"},
}

// mrouteOptions is the value of the flags; nil without --mroute.
func mrouteOptions(c *cli.Context) (*rules.Mroute, error) {
	if !c.Bool("mroute") {
		for _, k := range mrouteKeys {
			if c.IsSet(k.flag) {
				return nil, usagef("--%s without --mroute: want both", k.flag)
			}
		}
		return nil, nil
	}
	m := &rules.Mroute{}
	flagOf := map[string]string{}
	report := func(err error) error {
		var fault *rules.FieldError
		if errors.As(err, &fault) {
			return usagef("--%s %q: want %s", flagOf[fault.Field], fault.Value, fault.Want)
		}
		return err
	}
	for _, k := range mrouteKeys {
		flagOf["mroute."+k.key] = k.flag
		values := c.StringSlice(k.flag)
		if k.key == "joined" {
			values = []string{c.String(k.flag)}
		}
		for _, value := range values {
			if err := m.Set(k.key, value); err != nil {
				return nil, report(err)
			}
		}
	}
	if err := m.Validate(); err != nil {
		return nil, report(err)
	}
	return m, nil
}
