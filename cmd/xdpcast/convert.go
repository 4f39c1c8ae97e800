package main

import (
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"xdpcast/internal/convert"
)

func convertCommand() *cli.Command {
	return &cli.Command{
		Name:      "convert",
		Usage:     "convert another relay's configuration to rules",
		ArgsUsage: "FILE",
		Description: "Reads smcroute.conf, igmpproxy.conf or an FRR configuration with static multicast routes (ip mroute), and writes a\n" +
			"rule file for check and run -c. Each line without an equivalent becomes a comment that says why.\n" +
			"FILE is - for standard input.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "from", Usage: "`FORMAT` of FILE: smcroute, igmpproxy, frr, or detect", Value: convert.Detect.String()},
		},
		Action: convertFile,
	}
}

func convertFile(c *cli.Context) error {
	if err := nargs(c, 1, 1); err != nil {
		return err
	}
	format, err := convert.ParseFormat(c.String("from"))
	if err != nil {
		return usagef("--from %q: want smcroute, igmpproxy, frr or detect", c.String("from"))
	}
	name := c.Args().First()
	in := c.App.Reader
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, convert.MaxSize+1))
	if err != nil {
		return err
	}
	result, err := convert.Parse(data, format)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if _, err := c.App.Writer.Write(result.File()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.App.ErrWriter, "xdpcast: %v: %s; %s without an equivalent, in whole or in part\n", result.Format, plural(len(result.Rules()), "rule"), plural(result.Notes(), "line"))
	return err
}
