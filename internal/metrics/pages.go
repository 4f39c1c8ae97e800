package metrics

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"time"
)

// pages serves a page that is made anew for those who ask, by one request at a time: those who ask meanwhile share the next.
// A page stays in memory until the slowest of its clients has read it; clients that keep too much from being freed are cut off, the
// slowest first, so that they cannot keep others from being served.
type pages struct {
	// make makes the parts of a page.
	make func(ctx context.Context) [][]byte
	// most is how many bytes of pages may be unread while another one is made, if that are several pages.
	most int

	turn sync.Mutex // of making a page

	mu     sync.Mutex
	next   *page   // to be made; those who ask join it. nil: by the next who asks
	unread []*page // made, and being read, the oldest first
}

// page is a page and its clients. Its fields are guarded by pages.mu, but for parts, which are set before made is closed.
type page struct {
	made    chan struct{}
	parts   [][]byte // nil: making it failed
	size    int
	clients map[*http.ResponseController]bool
}

// ServeHTTP implements http.Handler.
func (p *pages) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	client := http.NewResponseController(w)
	of, first := p.join(client)
	defer p.leave(of, client)
	if first {
		p.fill(context.WithoutCancel(r.Context()), of) // it is the others', too
	}
	select {
	case <-of.made:
	case <-r.Context().Done():
		return
	}
	if of.parts == nil {
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	for _, part := range of.parts {
		if _, err := w.Write(part); err != nil {
			return // the client disconnected, or was cut off
		}
	}
}

// join makes a client one of those of the next page. The first of them must fill it.
func (p *pages) join(client *http.ResponseController) (of *page, first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if first = p.next == nil; first {
		p.next = &page{made: make(chan struct{}), clients: map[*http.ResponseController]bool{}}
	}
	p.next.clients[client] = true
	return p.next, first
}

// leave forgets a client, and with the last one its page.
func (p *pages) leave(of *page, client *http.ResponseController) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if delete(of.clients, client); len(of.clients) == 0 {
		p.unread = slices.DeleteFunc(p.unread, func(one *page) bool { return one == of })
	}
}

// fill makes a page when its turn has come.
func (p *pages) fill(ctx context.Context, of *page) {
	p.turn.Lock()
	defer p.turn.Unlock()
	defer close(of.made) // also after a panic
	p.mu.Lock()
	p.next = nil // what is read from here on is too old for those who ask now
	p.makeRoom()
	p.mu.Unlock()
	parts := p.make(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	of.parts = parts
	for _, part := range parts {
		of.size += len(part)
	}
	p.unread = append(p.unread, of) // its first client is still there
}

// makeRoom cuts off the clients of the oldest pages while several are unread and have too many bytes. The caller holds
// the lock.
func (p *pages) makeRoom() {
	sum := 0
	for _, one := range p.unread {
		sum += one.size
	}
	for i := 0; i < len(p.unread)-1 && sum > p.most; i++ {
		sum -= p.unread[i].size
		for client := range p.unread[i].clients {
			_ = client.SetWriteDeadline(time.Now()) // a writer without deadlines does not block
		}
	}
}
