#!/usr/bin/env python3
"""Writes moldudp64.pcap: 300 packets of MoldUDP64 1.00 to 239.10.10.10:5004, of 1 to 9 messages each, with
neutral content of the lengths that ITCH messages have. It knows nothing of xdpcast: it is made from the
protocol's specification alone."""
import random
import struct

random.seed(1)
LENGTHS = [12, 19, 23, 31, 35, 36, 40, 50]  # of messages of ITCH 5.0


def ipv4(payload):
    udp = struct.pack("!HHHH", 26477, 5004, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0x4000, 4, 17, 0, bytes([10, 0, 0, 1]), bytes([239, 10, 10, 10]))
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", total ^ 0xFFFF) + head[12:] + udp


number = 1
with open("moldudp64.pcap", "wb") as out:
    out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
    for i in range(300):
        count = random.randint(1, 9)
        body = b"NEUTRAL001" + struct.pack("!QH", number, count)
        for k in range(count):
            length = random.choice(LENGTHS)
            body += struct.pack("!H", length) + bytes((number + k + j) & 0xFF for j in range(length))
        frame = bytes.fromhex("01005e0a0a0a0200000000090800") + ipv4(body)
        out.write(struct.pack("<IIII", i // 1000, i % 1000 * 1000, len(frame), len(frame)) + frame)
        number += count
