// Package web serves a relay to browsers: a page, embedded in the program, and the API that it speaks.
package web

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"xdpcast/internal/control"
	"xdpcast/internal/events"
)

// Options configures a handler.
type Options struct {
	// Context ends the answers that go on.
	Context context.Context
	Backend control.Backend
	// Matched says how many packets each rule has matched, at little cost: it is asked every 5 seconds, whether
	// a page is open or not. Nil: pages draw no rates of before they were opened.
	Matched func(context.Context) (map[string]uint64, error)
	Events  *events.Log
	// Metrics answers /metrics, /healthz and /readyz.
	Metrics http.Handler
	// Token is what a client must show that changes rules; empty: nobody can.
	Token string
	// Names are what the server may be called besides localhost, addresses and this host's name.
	Names []string
	// Log is told of every change, and of what is refused. Nil: nobody.
	Log *slog.Logger
}

//go:embed static
var static embed.FS

// csp allows what the page brings itself, and nothing else: no script or style that stands in a
// document, no other host, no frame around it.
const csp = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"

// Handler serves the page at /, the API below /v1 and what Options.Metrics does. Requests by a name that is not
// the server's are refused, and so are changes that another site's page asks for.
func Handler(o Options) http.Handler {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	files, err := fs.Sub(static, "static")
	if err != nil {
		panic(err) // it is embedded
	}
	api := control.NewHandler(o.Backend, control.Options{Log: o.Log, Events: o.Events}, o.Token)
	mux := http.NewServeMux()
	mux.Handle("/metrics", o.Metrics)
	mux.Handle("/healthz", o.Metrics)
	mux.Handle("/readyz", o.Metrics)
	mux.Handle("/v1/", api)
	mux.Handle("GET /v1/live", newHub(o))
	mux.HandleFunc("GET /v1/access", func(w http.ResponseWriter, _ *http.Request) {
		control.ServeJSON(w, map[string]bool{"writable": o.Token != ""}, nil)
	})
	started := time.Now().UTC().Truncate(time.Second)
	page := http.FileServerFS(files)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Last-Modified", started.Format(http.TimeFormat)) // embedded files have no time
		page.ServeHTTP(w, r)
	})
	names := append(slices.Clone(o.Names), "localhost")
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", csp)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-cache")
		if err := errors.Join(checkHost(r, names), checkOrigin(r)); err != nil {
			o.Log.Warn("request refused", "peer", r.RemoteAddr, "error", err)
			h.Set("Content-Type", "text/plain; charset=utf-8")
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintln(w, err)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// checkHost refuses a request by a foreign name: the page of a site whose name was made to lead here could
// read the answer (DNS rebinding). An address is no name that anybody else can have.
func checkHost(r *http.Request, names []string) error {
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if net.ParseIP(host) != nil || slices.ContainsFunc(names, func(name string) bool { return strings.EqualFold(name, host) }) {
		return nil
	}
	return fmt.Errorf("host %.100q is not a name of this server: want an address, localhost, or a name given with --listen-name", host)
}

// checkOrigin refuses what another site's page asks for. The header that has the token could not be
// set there anyway, and answers could not be read: this is the second wall.
func checkOrigin(r *http.Request) error {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" && r.Header.Get("Sec-Fetch-Mode") != "navigate" {
		return fmt.Errorf("asked for by the page of another site")
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return nil
	}
	if u, err := url.Parse(origin); err == nil && u.Host == r.Host && u.Host != "" {
		return nil
	}
	return fmt.Errorf("asked for by the page of another site, %.100q", origin)
}

// minToken is the shortest token, in bytes.
const minToken = 16

// ReadToken reads a file that holds a token, which nobody but its owner and group may read.
func ReadToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return "", err
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s: want a regular file", path)
	case info.Mode().Perm()&0o007 != 0:
		return "", fmt.Errorf("%s: everybody may read it (mode %04o): want at most 0640", path, info.Mode().Perm())
	}
	text := make([]byte, 4096)
	n, err := f.Read(text)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	token := strings.TrimSpace(string(text[:n]))
	if len(token) < minToken || n == len(text) || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s: want one token of %d or more letters, digits and signs, such as openssl rand -hex 16 writes", path, minToken)
	}
	return token, nil
}
