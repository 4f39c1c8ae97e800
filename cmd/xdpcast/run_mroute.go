package main

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/mroute"
	"xdpcast/internal/relay"
)

// mrouteFlags are those of the mirror of multicast routes.
func mrouteFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "mroute", Usage: "forward what the kernel's multicast routes say (of FRR, smcroute, pimd, igmpproxy) in XDP"},
		&cli.StringSliceFlag{Name: "mroute-table", Usage: "mirror `TABLE`: main, or a number (repeatable)", DefaultText: "main"},
		&cli.StringSliceFlag{Name: "mroute-family", Usage: "mirror routes of `FAMILY`: ipv4 or ipv6 (repeatable)", DefaultText: "both"},
		&cli.StringSliceFlag{Name: "mroute-interface", Usage: "mirror only routes whose interfaces are all named: `IFACE` (repeatable)", DefaultText: "any"},
		&cli.StringSliceFlag{Name: "mroute-group", Usage: "mirror only routes whose group is in `PREFIX` (repeatable)", DefaultText: "any"},
		&cli.StringSliceFlag{Name: "mroute-leave", Usage: "leave groups in `PREFIX` to the kernel: those that programs on this host receive (repeatable)"},
	}
}

// mrouteOptions is what the flags say; nil without --mroute.
func mrouteOptions(c *cli.Context) (*relay.MrouteOptions, error) {
	if !c.Bool("mroute") {
		for _, f := range mrouteFlags() {
			if name := f.Names()[0]; name != "mroute" && c.IsSet(name) {
				return nil, usagef("--%s without --mroute: want both", name)
			}
		}
		return nil, nil
	}
	o := &relay.MrouteOptions{Selection: mroute.Selection{Interfaces: c.StringSlice("mroute-interface")}}
	for _, text := range c.StringSlice("mroute-table") {
		table := uint64(mroute.Main)
		if text != "main" {
			var err error
			if table, err = strconv.ParseUint(text, 10, 32); err != nil || table == 0 {
				return nil, usagef("--mroute-table %q: want main, or a number from 1 to 4294967295", text)
			}
		}
		o.Tables = append(o.Tables, uint32(table))
	}
	families := c.StringSlice("mroute-family")
	for _, text := range families {
		if text != "ipv4" && text != "ipv6" {
			return nil, usagef("--mroute-family %q: want ipv4 or ipv6", text)
		}
	}
	o.IPv4 = len(families) == 0 || slices.Contains(families, "ipv4")
	o.IPv6 = len(families) == 0 || slices.Contains(families, "ipv6")
	var err error
	if o.Selection.Groups, err = groupPrefixes(c, "mroute-group"); err != nil {
		return nil, err
	}
	o.Selection.Leave, err = groupPrefixes(c, "mroute-leave")
	return o, err
}

// groupPrefixes reads a flag of prefixes of groups; a group alone is one of its full length.
func groupPrefixes(c *cli.Context, name string) (all []netip.Prefix, err error) {
	for _, text := range c.StringSlice(name) {
		p, err := netip.ParsePrefix(text)
		if addr, e := netip.ParseAddr(text); e == nil && addr.Zone() == "" {
			p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil || !p.Addr().IsMulticast() || p != p.Masked() {
			return nil, usagef("--%s %q: want a prefix of multicast groups, such as 239.1.0.0/16", name, text)
		}
		all = append(all, p)
	}
	return all, nil
}
