#!/usr/bin/env python3
"""Writes frames.pcap: UDP in every wrapping that the relay is to see through, made by
scapy (Debian's python3-scapy), which shares no code with the parsers here. Each datagram
is to ff3e::1 or 239.1.1.1, port 5000, and all of its fragments follow each other; its
payload is b"relay" repeated. frames.json says of each frame what it is."""

import json
import os

from scapy.all import (Dot1AD, Dot1Q, Ether, IP, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment,
                       IPv6ExtHdrHopByHop, PadN, Raw, UDP, fragment, fragment6, wrpcap)

HERE = os.path.dirname(os.path.abspath(__file__))
ETHER6 = Ether(src="02:00:00:00:00:09", dst="33:33:00:00:00:01")
ETHER4 = Ether(src="02:00:00:00:00:09", dst="01:00:5e:01:01:01")
BASE6 = IPv6(src="2001:db8::7", dst="ff3e::1", hlim=8)
BASE4 = IP(src="10.0.0.7", dst="239.1.1.1", ttl=8, id=77)
PAYLOAD = UDP(sport=4000, dport=5000) / Raw(b"relay" * 400)
HOP, DEST = IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)]), IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 12)])

frames, about = [], []


def add(name, packets, header=ETHER6):
    for i, packet in enumerate(packets):
        frames.append(header / packet)
        about.append({"name": name, "part": "whole" if len(packets) == 1 else "first" if i == 0 else "later"})


def number(packets, value):
    """fragment6 chooses the identification at random: the file is to be the same each time."""
    for packet in packets:
        packet[IPv6ExtHdrFragment].id = value
    return packets


SHORT = UDP(sport=4000, dport=5000) / Raw(b"relay" * 4)
add("plain", [BASE6 / SHORT])
add("hop-by-hop", [BASE6 / HOP / SHORT])
add("destination options", [BASE6 / DEST / SHORT])
add("hop-by-hop and destination options", [BASE6 / HOP / DEST / SHORT])
frag = IPv6ExtHdrFragment()
add("fragments", number(fragment6(BASE6 / frag / PAYLOAD, 800), 1))
add("hop-by-hop in front of fragments", number(fragment6(BASE6 / HOP / frag / PAYLOAD, 800), 2))
add("destination options in front of fragments", number(fragment6(BASE6 / DEST / frag / PAYLOAD, 800), 3))
add("destination options behind the fragment header", number(fragment6(BASE6 / frag / DEST / PAYLOAD, 800), 4))
add("hop-by-hop, fragment header, destination options", number(fragment6(BASE6 / HOP / frag / DEST / PAYLOAD, 800), 5))
add("atomic fragment", [BASE6 / IPv6ExtHdrFragment(id=6) / SHORT])
add("atomic fragment with destination options", [BASE6 / IPv6ExtHdrFragment(id=7) / DEST / SHORT])
add("IPv4", [BASE4 / SHORT], ETHER4)
add("IPv4 fragments", fragment(BASE4 / PAYLOAD, 800), ETHER4)
add("IPv4 in a VLAN", [BASE4 / SHORT], ETHER4 / Dot1Q(vlan=100))
add("IPv6 in two VLANs", [BASE6 / SHORT], ETHER6 / Dot1AD(vlan=10) / Dot1Q(vlan=100))

for frame in frames:
    frame.time = 0
wrpcap(os.path.join(HERE, "frames.pcap"), frames, linktype=1)
with open(os.path.join(HERE, "frames.json"), "w") as out:
    json.dump(about, out, indent=1)
    out.write("\n")
