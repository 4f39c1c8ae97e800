package convert

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"xdpcast/pkg/rules"
)

var update = flag.Bool("update", false, "write what the files become to testdata")

// TestFiles: each file of testdata becomes the rules that stand beside it.
func TestFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/*.conf")
	if err != nil || len(files) < 9 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			r, err := Parse(data, Detect)
			if err != nil {
				t.Fatal(err)
			}
			if want, _, _ := strings.Cut(filepath.Base(file), "-"); r.Format.String() != want {
				t.Errorf("taken for %v", r.Format)
			}
			check(t, data, r)
			golden := strings.TrimSuffix(file, ".conf") + ".yaml"
			if *update {
				if err := os.WriteFile(golden, r.File(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(r.File(), want) {
				t.Errorf("got\n%s\nwant\n%s", r.File(), want)
			}
		})
	}
}

// check holds a result to its form: what is written is read back, and each line of the
// file stands in it at most once as a rule.
func check(t *testing.T, data []byte, r Result) {
	t.Helper()
	back, err := rules.ParseFile("f", r.File())
	if err != nil || !slices.EqualFunc(back, r.Rules(), rules.Equal) {
		t.Fatalf("%v\n%v\n%v\n%s", err, back, r.Rules(), r.File())
	}
	last, ruled := 0, 0
	for _, l := range r.Lines {
		if l.Number < last || l.Number > 1+bytes.Count(data, []byte("\n")) || l.Text == "" || l.Rule == nil && l.Note == "" {
			t.Errorf("%+v", l)
		}
		if l.Rule != nil {
			if l.Number == ruled {
				t.Errorf("two rules of line %d", l.Number)
			}
			ruled = l.Number
		}
		last = l.Number
	}
}

func TestParseFaults(t *testing.T) {
	for text, want := range map[string]string{
		"":                  "no line of smcroute.conf",
		"rules:\n- name: a": "no line of smcroute.conf",
	} {
		if _, err := Parse([]byte(text), Detect); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	if _, err := Parse(make([]byte, MaxSize+1), SMCRoute); err == nil {
		t.Error("a large file is taken")
	}
	if _, err := Parse(nil, Format(9)); err == nil {
		t.Error("an unknown format is taken")
	}
	for f := Detect; f <= FRR; f++ {
		if got, err := ParseFormat(f.String()); got != f || err != nil {
			t.Errorf("%v: %v, %v", f, got, err)
		}
	}
	if _, err := ParseFormat("mrouted"); err == nil || err.Error() != `format "mrouted": want detect, smcroute, igmpproxy, frr` {
		t.Error(err)
	}
	r, err := Parse([]byte("# nothing\n"), FRR)
	if err != nil || len(r.Lines) != 0 || string(r.File()) != "rules: []\n" {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestManyRoutes: names stay apart and the work grows with the file alone.
func TestManyRoutes(t *testing.T) {
	var b strings.Builder
	for i := range 4_000 {
		fmt.Fprintf(&b, "mroute from in%d@ source 2001:db8:aaaa:bbbb:cccc:dddd:eeee:1 group ff3e:aaaa:bbbb:cccc:dddd:eeee:aaaa:1 to out\n", i%2)
		fmt.Fprintf(&b, "mroute from input-%d source 2001:db8:aaaa:bbbb:cccc:dddd:eeee:1 group ff3e:aaaa:bbbb:cccc:dddd:eeee:aaaa:1 to out\n", i)
	}
	r, err := Parse([]byte(b.String()), SMCRoute)
	if err != nil || len(r.Rules()) != 4_000 || r.Notes() != 4_000 {
		t.Errorf("%d rules, %d notes, %v", len(r.Rules()), r.Notes(), err)
	}
	check(t, []byte(b.String()), r)
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.conf")
	for i, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, uint8(i))
	}
	f.Add([]byte("mroute from e group 239.1.1.1/3 to \x00 \xff: #\nmgroup from e group 239.1.1.1"), uint8(1))
	f.Add([]byte("phyint\nphyint x upstream\nphyint y downstream threshold 255\nwhitelist 0.0.0.0/0"), uint8(2))
	f.Fuzz(func(t *testing.T, data []byte, format uint8) {
		r, err := Parse(data, Format(format%4))
		if err != nil {
			if r.Lines != nil {
				t.Error("lines beside an error")
			}
			return
		}
		check(t, data, r)
	})
}
