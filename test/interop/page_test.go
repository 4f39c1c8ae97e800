//go:build interop

package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"xdpcast/internal/control"
	"xdpcast/internal/lab"
	"xdpcast/internal/labtest"
)

// forward lets the browser, which runs on no test host, reach a server on one; it returns the address.
func forward(t *testing.T, h *lab.Host, to string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { // before the host is closed
		cancel()
		ln.Close()
		running.Wait()
	})
	serve := func(near net.Conn) {
		defer near.Close()
		var far net.Conn
		if err := h.Do(func() (err error) {
			far, err = (&net.Dialer{}).DialContext(ctx, "tcp", to)
			return err
		}); err != nil {
			return
		}
		defer far.Close()
		defer context.AfterFunc(ctx, func() {
			near.Close()
			far.Close()
		})()
		running.Go(func() {
			_, _ = io.Copy(far, near)
			far.Close()
		})
		_, _ = io.Copy(near, far)
	}
	running.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() { serve(near) })
		}
	})
	return ln.Addr().String()
}

// browser is a tab of a headless Chromium.
type browser struct {
	t   *testing.T
	ctx context.Context

	mu         sync.Mutex
	complaints []string // on the console: errors, and violations of the content security policy
}

func newBrowser(ctx context.Context, t *testing.T) *browser {
	t.Helper()
	ctx, cancel := chromedp.NewExecAllocator(ctx, append(chromedp.DefaultExecAllocatorOptions[:len(chromedp.DefaultExecAllocatorOptions):len(chromedp.DefaultExecAllocatorOptions)], chromedp.WSURLReadTimeout(labtest.Timeout))...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	b := &browser{t: t, ctx: ctx}
	// The first call creates the tab, which lives as long as its context.
	err := chromedp.Listen(ctx, func(event any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			b.complaints = append(b.complaints, fmt.Sprint(e.ExceptionDetails.Text, " ", e.ExceptionDetails.Exception))
		case *log.EventEntryAdded:
			if e.Entry.Level == log.EntryLevelError {
				b.complaints = append(b.complaints, e.Entry.Text+" "+e.Entry.URL)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	b.run("listen to the console", chromedp.Func(func(ctx context.Context, tab *chromedp.Target) error {
		_, err := cdp.Call(ctx, tab, log.Enable, cdp.Empty{})
		return err
	}))
	return b
}

func (b *browser) run(what string, steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, labtest.Timeout)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		b.shot(b.t.Name() + "-failed")
		b.t.Fatalf("%s: %v", what, err)
	}
}

// do runs a script.
func do(script string) chromedp.Action[chromedp.Void] {
	return chromedp.Evaluate[chromedp.Void]("void (" + script + ")")
}

// eval returns the result of a script.
func eval[T any](b *browser, script string) T {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, labtest.Timeout)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](script, chromedp.EvalAwaitPromise))
	if err != nil {
		b.t.Fatalf("%s: %v", script, err)
	}
	return v
}

// until waits until a script returns true.
func (b *browser) until(what, script string) {
	b.t.Helper()
	defer func() {
		if b.t.Failed() {
			b.shot(strings.ReplaceAll(b.t.Name(), "/", "-") + "-failed")
			b.mu.Lock()
			defer b.mu.Unlock()
			b.t.Logf("the console: %q", b.complaints)
		}
	}()
	labtest.Eventually(b.t, what, func() bool { return eval[bool](b, "Boolean("+script+")") })
}

// shot takes a screenshot if SCREENSHOTS names a directory for them.
func (b *browser) shot(name string) {
	dir := os.Getenv("SCREENSHOTS")
	if dir == "" {
		return
	}
	ctx, cancel := context.WithTimeout(b.ctx, labtest.Timeout)
	defer cancel()
	shot, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	if err != nil {
		b.t.Logf("screenshot: %v", err)
		return
	}
	if shot, err = small(shot); err == nil {
		err = os.WriteFile(filepath.Join(dir, name+".png"), shot, 0o644)
	}
	if err != nil {
		b.t.Error(err)
	}
}

// small is a screenshot reduced to its 192 most frequent colours, of 32,768: less than half the size.
func small(shot []byte) ([]byte, error) {
	full, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		return nil, err
	}
	coarse := func(x, y int) color.RGBA {
		r, g, b, _ := full.At(x, y).RGBA()
		round := func(v uint32) uint8 { return uint8(min(255, (v>>8+4)&^7)) }
		return color.RGBA{round(r), round(g), round(b), 255}
	}
	count := map[color.RGBA]int{}
	bounds := full.Bounds()
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			count[coarse(x, y)]++
		}
	}
	most := slices.SortedFunc(maps.Keys(count), func(a, b color.RGBA) int { return count[b] - count[a] })
	var palette color.Palette
	for _, c := range most[:min(192, len(most))] {
		palette = append(palette, c)
	}
	flat := image.NewPaletted(bounds, palette)
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			flat.Set(x, y, coarse(x, y))
		}
	}
	var out bytes.Buffer
	err = (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, flat)
	return out.Bytes(), err
}

// size sets the window size, and whether the user prefers a dark page.
func (b *browser) size(width, height int64, dark bool) {
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	b.run("size", chromedp.EmulateViewport(width, height), chromedp.Func(func(ctx context.Context, tab *chromedp.Target) error {
		_, err := cdp.Call(ctx, tab, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
		}})
		return err
	}))
}

// fits requires that nothing sticks out of the window.
func (b *browser) fits(what string) {
	b.t.Helper()
	if over := eval[int](b, `document.documentElement.scrollWidth - document.documentElement.clientWidth`); over > 0 {
		b.t.Errorf("%s: the page is %d pixels wider than the window", what, over)
	}
}

// past is the daemon's history of the last minutes.
type past struct {
	Step  float64
	Taken int
	Rates map[string][]float64
}

func lastMinutes(t *testing.T, address string) past {
	t.Helper()
	answer, err := http.Get("http://" + address + "/v1/live?history")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var m struct{ History past }
	if err := json.NewDecoder(answer.Body).Decode(&m); err != nil {
		t.Fatal(err)
	}
	return m.History
}

const text = `document.body.innerText`

// TestPage has a real browser show the API's data, and add, change and delete a rule that relays.
func TestPage(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	const token = "0123456789abcdef0123"
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	relay := startRelay(ctx, t, n.relay, `rules:
  - name: studio-a
    in: 239.10.10.10:5004%in0
    out: ["239.20.20.20:6004%out0,ttl=8", "239.30.30.30:7004%out1,rate=50pps", "239.30.30.31:7004%late0"]
  - {name: studio-b, in: "10.0.0.1@232.10.10.11:5004%in0", out: ["239.20.20.21:6004%out0"]}
  - {name: constructor, in: "239.10.10.12:5004%late1", out: ["239.20.20.22:6004%out0"]} # idle, and a property of every object
`, "--listen", "127.0.0.1:9464", "--token-file", tokenFile)
	address := forward(t, n.relay, "127.0.0.1:9464")
	sender := start(ctx, t, n.source, relay.program, "gen", "--rate", "200", "239.10.10.10:5004%eth0")
	const before = 2 // steps of 5 seconds with packets, while no page is open
	labtest.Eventually(t, "the daemon knows the last minutes", func() bool {
		return len(lastMinutes(t, address).Rates["studio-a"]) >= before
	})
	b := newBrowser(ctx, t)
	b.size(1280, 800, false)
	b.run("open", chromedp.Navigate("http://"+address+"/"))
	b.until("the rates of before are drawn at once", `document.querySelector('.row[data-rule="studio-a"] polyline')`)
	points := strings.Fields(eval[string](b, `document.querySelector('.row[data-rule="studio-a"] polyline').getAttribute("points")`))
	above := 0
	for _, p := range points {
		if x, y, ok := strings.Cut(p, ","); ok && x <= "120.0" && y != "22.0" { // y = 22 is the zero line
			above++
		}
	}
	if above < before {
		t.Errorf("%d points with packets, want %d: %s", above, before, points)
	}
	b.until("the page is live", `document.getElementById("connection").textContent === "live"`)
	b.until("all rules are shown", `document.querySelectorAll(".row").length === 3`)
	all, err := control.NewClient(relay.socket).Rules(ctx)
	if err != nil {
		t.Fatal(err)
	}
	b.until("what drops is said to", `document.querySelector('.row[data-rule="studio-a"]').textContent.includes("dropping")`)
	b.until("studio-a stands at the top", `document.querySelector('.row[data-at="0"]').dataset.rule === "studio-a"`)
	for _, r := range all {
		state := r.State
		if r.Name == "studio-a" {
			state = "dropping" // for the output that has a rate
		}
		for _, want := range []string{r.Name, state, r.Reason} {
			b.until(fmt.Sprintf("the row of %s has %q", r.Name, want), fmt.Sprintf(`document.querySelector('.row[data-rule="%s"]').textContent.includes(%q)`, r.Name, want))
		}
	}
	b.until("the rate of the sender is shown", `/^(1[5-9]\d|2[0-4]\d)\/s$/.test(document.querySelector('.row[data-rule="studio-a"] .c-pps').textContent)`)
	if eval[bool](b, `Boolean([...document.querySelectorAll("button")].find(b => b.textContent === "Edit"))`) {
		t.Error("rules can be edited without a token")
	}
	b.until("lines are drawn", `document.querySelector('.row[data-rule="studio-a"] polyline')?.getAttribute("points").split(" ").length > 5`)
	shots(b, "rules")

	// The keyboard alone leads to a rule's own page.
	b.run("keys", chromedp.Focus(chromedp.CSS(`.row[tabindex="0"]`)), chromedp.KeyEvent("\ue015"), chromedp.KeyEvent("\r"))
	b.until("a rule's page is shown", `location.hash.startsWith("#/rules/") && document.querySelector("svg.way")`)
	b.run("go to studio-a", do(`location.hash = "#/rules/studio-a"`))
	b.until("its events are shown", `document.querySelector(".events li")?.textContent.includes("studio-a")`)
	b.until("its outputs have rates", `/\d+(\.\d)?\/s/.test(document.querySelector("table tbody")?.innerText ?? "")`)
	shots(b, "rule")
	b.run("set the browser's clock an hour ahead", do(`Date.now = ((now) => () => now() + 3600e3)(Date.now)`))
	b.until("the page is live again", `document.getElementById("connection").textContent === "live"`)
	b.until("ages are by the daemon's clock", `/packets, [^,]*, last \d+ s ago/.test(`+text+`)`)
	sender.stop(syscall.SIGINT)
	rule := relay.arrived(ctx, t, "studio-a", datagramsSent(t, n.source, true))
	b.until("the page has what the API says", fmt.Sprintf(`%s.includes("%d packets,") && document.querySelector("svg.way").getAttribute("aria-label").includes("%d sent")`, text, rule.Matched.Packets, rule.Outputs[0].Sent.Packets))

	// From here on, changes.
	b.run("unlock", chromedp.Click(chromedp.CSS("#access")), chromedp.SendKeys(chromedp.CSS("#token"), "wrong token and long"), chromedp.Click(chromedp.CSS("#dialog button.primary")),
		do(`location.hash = "#/edit/"`), chromedp.WaitVisible(chromedp.CSS("#name")))
	fillIn := func(name, in, out string) {
		b.t.Helper()
		b.run("fill in", do(`["name", "in", "out0"].forEach(id => { document.getElementById(id).value = ""; })`),
			chromedp.SendKeys(chromedp.CSS("#name"), name), chromedp.SendKeys(chromedp.CSS("#in"), in), chromedp.SendKeys(chromedp.CSS("#out0"), out))
	}
	fillIn("cam 1", "239.1.1.1:99999%in0", "239.2.2.2:6000")
	for id, want := range map[string]string{"name": "want", "in": "want 1 to 65535", "out0": "interface missing"} {
		b.until("the fault of "+id+" is at its field", fmt.Sprintf(`document.getElementById("%s-fault").textContent.includes(%q) && document.getElementById("%s").getAttribute("aria-invalid") === "true"`, id, want, id))
	}
	shots(b, "faults")
	fillIn("cam1", "239.1.1.1:5000%in0", "239.20.20.40:6000%out0,ttl=9")
	b.run("submit", chromedp.Click(chromedp.CSS("#preview")))
	b.until("a wrong token is refused", text+`.includes("the token is missing or wrong")`)
	b.run("unlock", chromedp.Click(chromedp.CSS("#access")), chromedp.Click(chromedp.CSS("#access")), chromedp.SendKeys(chromedp.CSS("#token"), token), chromedp.Click(chromedp.CSS("#dialog button.primary")), chromedp.WaitVisible(chromedp.CSS("#name")))
	fillIn("cam1", "239.1.1.1:5000%in0", "239.20.20.40:6000%out0,ttl=9")
	b.run("submit", chromedp.Click(chromedp.CSS("#preview")))
	b.until("the difference is shown", `document.querySelector("#dialog[open] .diff")?.textContent.includes("+   out: 239.20.20.40:6000%out0,ttl=9")`)
	if _, err := control.NewClient(relay.socket).Rule(ctx, "cam1"); err == nil {
		t.Error("the rule is there although nobody has said apply")
	}
	shots(b, "difference")
	b.run("apply", chromedp.Click(chromedp.CSS("#apply")))
	b.until("the rule's page is shown", `location.hash === "#/rules/cam1" && `+text+`.includes("239.20.20.40:6000%out0,ttl=9")`)
	receiver := start(ctx, t, n.sinks[0], relay.program, "recv", "--strict", "--expect", "500", "--count", "500", "--expect-ttl", "9", "--duration", labtest.Timeout.String(), "239.20.20.40:6000%eth0")
	labtest.Eventually(t, "the receiver has joined", func() bool {
		return strings.Contains(in(ctx, t, n.sinks[0], "ip", "maddress", "show", "dev", "eth0"), "239.20.20.40")
	})
	in(ctx, t, n.source, relay.program, "gen", "--rate", "1000", "--count", "500", "239.1.1.1:5000%eth0")
	receiver.mustEnd(t)
	b.until("what it sent is shown", text+`.includes("500 sent")`)

	b.run("edit", do(`location.hash = "#/edit/cam1"`), chromedp.WaitVisible(chromedp.CSS("#out0")))
	b.run("change", chromedp.SetValue(chromedp.CSS("#out0"), "239.20.20.40:6000%out0,ttl=5"), chromedp.Click(chromedp.CSS("#preview")))
	b.until("old and new are shown", `["-   out: 239.20.20.40:6000%out0,ttl=9", "+   out: 239.20.20.40:6000%out0,ttl=5"].every(l => document.querySelector("#dialog[open] .diff")?.textContent.includes(l))`)
	b.run("apply", chromedp.Click(chromedp.CSS("#apply")))
	b.until("the change is shown", `location.hash === "#/rules/cam1" && `+text+`.includes("ttl=5")`)
	if got := relay.rule(ctx, t, "cam1").Out[0]; got != "239.20.20.40:6000%out0,ttl=5" {
		t.Errorf("the output is %s", got)
	}
	b.run("delete", chromedp.Click(`//button[text()="Delete"]`), chromedp.WaitVisible(chromedp.CSS("#apply")), chromedp.Click(chromedp.CSS("#apply")))
	b.until("the rule is gone", `location.hash === "#/rules" && document.querySelectorAll(".row").length === 3`)

	for _, page := range []string{"memberships", "interfaces", "events", "file"} {
		b.run(page, do(fmt.Sprintf(`location.hash = "#/%s"`, page)))
		want := map[string]string{"memberships": "239.10.10.10", "interfaces": "native", "events": "rule cam1", "file": ""}[page]
		b.until(page+" are shown", fmt.Sprintf(`document.querySelector("main h2") && %s.includes(%q)`, text, want))
		shots(b, page)
	}
	b.run("a page that is none", do(`location.hash = "#/constructor"`))
	b.until("the rules are shown instead", `document.querySelectorAll(".row").length === 3`)
	b.mu.Lock()
	for _, c := range b.complaints {
		if !strings.Contains(c, "403") { // from the wrong token
			t.Errorf("the browser complains: %s", c)
		}
	}
	b.mu.Unlock()
}

// shots takes screenshots at desktop, tablet and phone size, the last one dark; nothing sticks out.
func shots(b *browser, name string) {
	b.t.Helper()
	for _, size := range []struct {
		name          string
		width, height int64
		dark          bool
	}{{"tablet", 820, 1000, false}, {"phone", 390, 780, true}, {"desk", 1280, 800, false}} {
		b.size(size.width, size.height, size.dark)
		eval[bool](b, `new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))`)
		b.fits(name + " at the size of a " + size.name)
		b.shot(name + "-" + size.name)
	}
}

// TestPageWithManyRules: 10,000 rules can be searched, sorted and scrolled, and only the rows in view exist; the page
// reports when the daemon is gone.
func TestPageWithManyRules(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	var rules strings.Builder
	rules.WriteString("rules:\n")
	const many = 10_000
	for i := range many {
		fmt.Fprintf(&rules, "  - {name: r%05d, in: \"239.%d.%d.%d:5000%%in0\", out: [\"239.%d.%d.%d:6000%%out%d\"]}\n", i, 10, i/250, i%250+1, 20, i/250, i%250+1, i%2)
	}
	relay := startMany(ctx, t, n.relay, rules.String(), many, "--listen", "127.0.0.1:9464")
	address := forward(t, n.relay, "127.0.0.1:9464")
	b := newBrowser(ctx, t)
	b.size(1280, 800, false)
	b.run("open", chromedp.Navigate("http://"+address+"/"))
	b.until("all are shown", text+`.includes("10000 rules")`)
	if rows := eval[int](b, `document.querySelectorAll(".row").length`); rows < 10 || rows > 60 {
		t.Errorf("%d rows exist", rows)
	}
	b.run("end", do(`document.querySelector(".scroll").scrollTop = 1e9`))
	b.until("the last rule is in view", `document.querySelector('.row[data-rule="r09999"]')`)
	b.run("search", chromedp.SendKeys(chromedp.CSS("input[type=search]"), "239.10.12.7:"))
	b.until("one is found", `document.querySelectorAll(".row").length === 1 && document.querySelector('.row[data-rule="r03006"]')`)
	shots(b, "many")
	relay.stop(syscall.SIGKILL)
	b.until("the page says that the daemon is gone", `document.getElementById("connection").textContent === "the daemon does not answer"`)
	shots(b, "gone")
}

// TestPageChanges has the page reload the file, confirm, undo and roll back, and show what the API refuses.
func TestPageChanges(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	const token = "0123456789abcdef0123"
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := func(output string) string {
		return fmt.Sprintf("rules:\n  - {name: cam, in: \"239.10.10.10:5004%%in0\", out: [%q]}\n", output)
	}
	const one, two, three = "239.20.20.20:6001%out0", "239.20.20.20:6002%out0", "239.20.20.20:6003%out0"
	relay := startRelay(ctx, t, n.relay, file(one), "--listen", "127.0.0.1:9464", "--token-file", tokenFile)
	client := control.NewClient(relay.socket)
	output := func(want string) {
		t.Helper()
		if got := relay.rule(ctx, t, "cam").Out[0]; got != want {
			t.Errorf("the output is %s, want %s", got, want)
		}
	}
	waits := func(want bool) {
		t.Helper()
		status, err := client.Status(ctx)
		if err != nil || (status.Unconfirmed != nil) != want {
			t.Errorf("a change waits: %v, want %v (%v)", status.Unconfirmed, want, err)
		}
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(relay.file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const bar, hidden = `document.getElementById("pending").innerText`, `document.getElementById("pending").hidden`
	b := newBrowser(ctx, t)
	b.size(1280, 800, false)
	b.run("open", chromedp.Navigate("http://"+forward(t, n.relay, "127.0.0.1:9464")+"/#/history"))
	b.until("the set in force is shown", `document.querySelector('#history tr[data-back="0"]')?.innerText.includes("in force")`)
	if eval[bool](b, `Boolean(document.getElementById("reload"))`) || !eval[bool](b, hidden) {
		t.Error("there is a button without a token, or a change that waits")
	}
	unlock := func(token string) {
		t.Helper()
		b.run("unlock", chromedp.Click(chromedp.CSS("#access")), chromedp.SendKeys(chromedp.CSS("#token"), token), chromedp.Click(chromedp.CSS("#dialog button.primary")), chromedp.WaitVisible(chromedp.CSS("#reload")))
	}
	press := func(what, selector string) {
		t.Helper()
		b.until(what+" can be pressed", fmt.Sprintf("document.querySelector(%q)?.disabled === false", selector))
		b.run(what, chromedp.Click(chromedp.CSS(selector)))
	}
	probation := func(within string) {
		t.Helper()
		b.until("the dialog is open", `document.querySelector("#dialog[open] #within")`)
		b.run("on probation", chromedp.SetValue(chromedp.CSS("#within"), within))
	}
	const fault = `document.querySelector("main .fault").textContent`
	unlock("wrong token and long")
	press("reload", "#reload")
	b.until("a wrong token is refused", fault+`.includes("the token is missing or wrong")`)
	b.run("lock", chromedp.Click(chromedp.CSS("#access")))
	unlock(token)
	write("rules: [{name: cam, in: nowhere}]\n")
	press("reload", "#reload")
	b.until("what is wrong in the file is shown", fault+`.includes("nowhere")`)
	output(one)

	// A reload on probation, confirmed.
	write(file(two))
	press("reload", "#reload")
	b.until("the difference is shown", fmt.Sprintf(`["-   out: %s", "+   out: %s"].every(l => document.querySelector("#dialog[open] .diff")?.textContent.includes(l))`, one, two))
	output(one)
	shots(b, "reload")
	probation("10m")
	press("apply", "#apply")
	b.until("the change that waits is shown", bar+`.includes("reload is undone unless it is confirmed")`)
	b.until("so is the time left", `/^(10 min 00|\d min \d\d) s$/.test(document.getElementById("left").textContent)`)
	waits(true)
	output(two)
	shots(b, "pending")
	left := eval[string](b, `document.getElementById("left").textContent`)
	b.until("the time runs", fmt.Sprintf(`document.getElementById("left").textContent !== %q`, left))
	press("another reload", "#reload")
	b.until("it would change nothing", `document.querySelector("#dialog[open] #apply")?.disabled`)
	b.run("cancel", chromedp.Click(`//dialog//button[text()="Cancel"]`))
	press("an earlier set", `#history tr[data-back="1"] button`)
	probation("10m")
	press("apply", "#apply")
	b.until("another change is refused", `document.querySelector("#dialog .fault").textContent.includes("waits for confirmation")`)
	b.run("cancel", chromedp.Click(`//dialog//button[text()="Cancel"]`))
	b.run("lock", chromedp.Click(chromedp.CSS("#access")))
	b.until("who has no token sees it", bar+`.includes("Unlock changes to confirm or undo it")`)
	unlock(token)
	press("confirm", "#confirm")
	b.until("nothing waits", hidden)
	waits(false)
	output(two)

	// A reload on probation, undone.
	write(file(three))
	press("reload", "#reload")
	probation("10m")
	press("apply", "#apply")
	b.until("the change that waits is shown", `!`+hidden)
	output(three)
	press("undo", "#undo")
	b.until("nothing waits", hidden)
	waits(false)
	output(two)

	// The page also shows another's change; undoing it after it was confirmed reverts nothing.
	if _, err := client.Reload(ctx, control.ApplyOptions{Confirm: time.Hour}); err != nil {
		t.Fatal(err)
	}
	b.until("it is shown", bar+`.includes("by root") && /^(1 h 00|\d\d) min/.test(document.getElementById("left").textContent)`)
	if _, err := client.Confirm(ctx); err != nil {
		t.Fatal(err)
	}
	b.run("undo", do(`document.getElementById("undo")?.click()`))
	b.until("it is refused, or was gone", hidden+` || `+bar+`.includes("nothing was undone")`)
	output(three)

	// An earlier set.
	b.until("the sets are shown", `document.querySelector('#history tr[data-back="0"]').innerText.includes("reload") && document.querySelector('#history tr[data-back="1"]').innerText.includes("rollback")`)
	shots(b, "history")
	press("bring back", `#history tr[data-back="1"] button`)
	b.until("the difference is shown", fmt.Sprintf(`document.querySelector("#dialog[open] .diff")?.textContent.includes("+   out: %s")`, two))
	// Somebody else changes the rules while it is looked at.
	const in = "239.10.10.11:5004%in0 239.10.10.12:5004%in0"
	if _, err := client.AddRule(ctx, control.Rule{Name: "legs", In: in, Merge: "rtp,skew=50ms", Out: []string{"239.20.20.21:6000%out0"}}); err != nil {
		t.Fatal(err)
	}
	press("apply", "#apply")
	b.until("other rules than those that were looked at are not changed", `/changed meanwhile|look at the difference again/.test(document.querySelector("#dialog .fault").textContent)`)
	output(three)
	b.run("cancel", chromedp.Click(`//dialog//button[text()="Cancel"]`))
	b.until("the other change is shown", `document.querySelector('#history tr[data-back="0"]').innerText.includes("rule add legs")`)
	press("bring back", `#history tr[data-back="2"] button`)
	b.until("the difference is shown", fmt.Sprintf(`document.querySelector("#dialog[open] .diff")?.textContent.includes("+   out: %s")`, two))
	press("apply", "#apply")
	b.until("it is in force", `document.querySelector('#history tr[data-back="0"]').innerText.includes("rollback 2")`)
	output(two)
	waits(false)

	// A rule with several inputs keeps them, and how they are merged, when its output is edited.
	if _, err := client.AddRule(ctx, control.Rule{Name: "legs", In: in, Merge: "rtp,skew=50ms", Out: []string{"239.20.20.21:6000%out0"}}); err != nil {
		t.Fatal(err)
	}
	b.run("edit", do(`location.hash = "#/edit/legs"`), chromedp.WaitVisible(chromedp.CSS("#out0")))
	b.until("all of the rule is shown", fmt.Sprintf(`document.getElementById("in").value === %q && document.getElementById("merge").value === "rtp,skew=50ms"`, in))
	b.run("change", chromedp.SetValue(chromedp.CSS("#out0"), "239.20.20.21:6001%out0"), chromedp.SetValue(chromedp.CSS("#merge"), "rtp,skew=70ms"), chromedp.Click(chromedp.CSS("#preview")))
	b.until("what changes is shown", `["+   out: 239.20.20.21:6001%out0", "-   merge: rtp,skew=50ms", "+   merge: rtp,skew=70ms", "    in: 239.10.10.12:5004%in0"].every(l => document.querySelector("#dialog[open] .diff")?.textContent.includes(l))`)
	press("apply", "#apply")
	b.until("the rule is shown", `location.hash === "#/rules/legs"`)
	if got := relay.rule(ctx, t, "legs"); got.In != in || got.Merge != "rtp,skew=70ms" || got.Out[0] != "239.20.20.21:6001%out0" {
		t.Errorf("after an edit: %+v", got.Rule)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.complaints {
		if !strings.Contains(c, "403") && !strings.Contains(c, "400") && !strings.Contains(c, "409") { // for refused requests
			t.Errorf("the browser complains: %s", c)
		}
	}
}

// TestPageWithoutStreams: if a proxy refuses server-sent events, or holds them back, the page polls, and uses the
// stream once it gets through.
func TestPageWithoutStreams(t *testing.T) {
	ctx := labtest.Context(t)
	n := newNet(t)
	relay := startRelay(ctx, t, n.relay, `rules: [{name: cam, in: "239.10.10.10:5004%in0", out: ["239.20.20.20:6004%out0"]}]`, "--listen", "127.0.0.1:9464")
	// All the time: a rule that has had packets is silent ten seconds after the last.
	start(ctx, t, n.source, relay.program, "gen", "--rate", "1000", "239.10.10.10:5004%eth0")
	for _, how := range []string{"refused", "held back"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			target, err := url.Parse("http://" + forward(t, n.relay, "127.0.0.1:9464"))
			if err != nil {
				t.Fatal(err)
			}
			var through atomic.Bool
			var streams, polls atomic.Int32
			proxy := httputil.NewSingleHostReverseProxy(target)
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				stream := strings.Contains(r.Header.Get("Accept"), "text/event-stream")
				if !stream && r.URL.Path == "/v1/live" {
					polls.Add(1)
				}
				if stream && !through.Load() {
					streams.Add(1)
					if how == "refused" {
						http.Error(w, "no streams here", http.StatusBadGateway)
						return
					}
					w.Header().Set("Content-Type", "text/event-stream")
					_ = http.NewResponseController(w).Flush()
					<-r.Context().Done()
					return
				}
				proxy.ServeHTTP(w, r)
			}))
			b := newBrowser(ctx, t)
			t.Cleanup(func() {
				server.CloseClientConnections()
				server.Close()
			})
			b.size(1280, 800, false)
			b.run("open", chromedp.Navigate(server.URL+"/"))
			b.until("the page asks", `document.getElementById("connection").textContent === "live, by polling"`)
			before := polls.Load()
			b.until("the rule is shown", `document.querySelector('.row[data-rule="cam"]')?.textContent.includes("active")`)
			b.until("it has a rate", `/[1-9]\d*(\.\d+)?k?\/s/.test(document.querySelector('.row[data-rule="cam"] .c-pps').textContent)`)
			labtest.Eventually(t, "the page asks again", func() bool { return polls.Load() > before+1 })
			if streams.Load() == 0 {
				t.Error("the page has not asked for a stream: nothing was tested")
			}
			b.run("events", do(`location.hash = "#/events"`))
			b.until("events are shown", `document.querySelector(".events")?.innerText.includes("rule cam")`)
			through.Store(true)
			// A page that becomes visible again does not wait for its next attempt.
			b.run("come into view", do(`document.dispatchEvent(new Event("visibilitychange"))`))
			b.until("the page comes back to the stream", `document.getElementById("connection").textContent === "live"`)
		})
	}
}
