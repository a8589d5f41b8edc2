"""The system calls that a session may not make, by their numbers on x86-64 and aarch64.

Most of them need rights that a session does not have. They stand here all the same: what can not be called can not be
called wrong, and rights have been had through flaws of the kernel before.
"""

REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Memory that no limit counts: of nameless files, of the kernel, of pages that only a pipe still knows.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "remap_file_pages": (216, 234),
    # Other processes, and where memory lies.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Interfaces wide enough to have been the way out of many a sandbox.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "seccomp": (317, 277),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Namespaces and mounts: the old interface and the new one.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "nfsservctl": (180, 42),
    "sysfs": (139, None),
    "ustat": (136, None),
    "lookup_dcookie": (212, 18),
    # The machine and its kernel.
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "create_module": (174, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "get_kernel_syms": (177, None),
    "query_module": (178, None),
    "reboot": (169, 142),
    "sync": (162, 81),
    "syncfs": (306, 267),
    "syslog": (103, 116),
    "acct": (163, 89),
    "vhangup": (153, 58),
    "uselib": (134, None),
    "_sysctl": (156, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
}

UNKNOWN = 451
"""Calls from here on are newer than this list and do not exist; so are those of x86-64's second, 32-bit interface. C
libraries then take older ones."""
MISSING = {"clone3": (435, 435)}
"""Its flags lie in memory, where a filter can not read them: C libraries take `clone` where it does not exist."""

NAMESPACES = 0x7E02_0080
"""Flags of `clone` that open one: time, mount, cgroup, UTS, IPC, user, PID, network."""
SOCKETS = (1, 2, 10)
"""Address families: UNIX, IPv4, IPv6. The rest (netlink, packet, vsock, the kernel's ciphers…) is kernel code that
hardly anyone else runs, loaded at the first call."""
KINDS = (1, 2, 5)
"""Of sockets: stream, datagram, sequence of packets. Others are of protocols that are loaded for them."""
TRANSPORTS = (0, 1, 6, 17)
"""Protocols of a socket: its family's own, ICMP (UNIX sockets may say so too), TCP, UDP."""
TERMINALS = (0x5412, 0x541C, 0x541D, 0x5423)
"""Requests of `ioctl` that type into a terminal or take it over: TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD."""
LEASES = (1024, 1026)
"""Requests of `fcntl` that make others wait who open a file, the host's processes among them, or tell of them:
F_SETLEASE, F_NOTIFY."""
HUGE_PAGES = 0x0004_0000
"""Flag of `mmap` for pages that the host keeps in reserve, which count nowhere: MAP_HUGETLB."""
PERSONALITIES = (0, 0xFFFF_FFFF)
"""The usual one, and the question which it is."""
RLIMIT_CORE = 4
"""The limit that keeps a crash from starting the host's program for core dumps."""

CONDITIONAL = {
    "clone": (56, 220),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "mmap": (9, 222),
    "personality": (135, 92),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
}
"""Calls that are refused with some arguments only."""
