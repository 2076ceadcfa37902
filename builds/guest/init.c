// SPDX-License-Identifier: Apache-2.0
/*
 * The only program in the virtual machine: carries out /script, tells how each line of it ended, and powers off.
 *
 * It stands alone, without a C library, since a kmodbuild image need not have one to link with. A line of the script is
 * a number and then one of
 *	load PATH [PARAMETERS]	finit_module(2), once and without flags
 *	unload MODULE		delete_module(2)
 *	read PATH		the content of a file
 * and is answered on the console by lines that begin with "@@", the number and one of
 *	text LINE		a line of the file
 *	kernel LINE		what the kernel has logged meanwhile
 *	status ERRNO		the end; 0 is success
 * Every call is made once: what busybox's insmod tries a second time, the kernel refuses a second time.
 */
#define AT_FDCWD (-100)
#define O_RDONLY 0
#define O_NONBLOCK 04000
#define EAGAIN 11
#define EPIPE 32
#define RESTART 0x01234567

#if defined(__x86_64__)
enum { READ = 0, WRITE = 1, CLOSE = 3, MOUNT = 165, REBOOT = 169, DELETE = 176, OPENAT = 257, FINIT = 313 };

static long call(long number, long a, long b, long c, long d)
{
	long result;
	register long fourth __asm__("r10") = d;
	register long fifth __asm__("r8") = 0;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth)
			 : "rcx", "r11", "memory");
	return result;
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall run\n");
#elif defined(__aarch64__)
enum { MOUNT = 40, OPENAT = 56, CLOSE = 57, READ = 63, WRITE = 64, DELETE = 106, REBOOT = 142, FINIT = 273 };

static long call(long number, long a, long b, long c, long d)
{
	register long nr __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = 0;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(nr), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
	return x0;
}

__asm__(".globl _start\n_start:\n\tmov x29, #0\n\tbl run\n");
#else
#error "no system calls for this architecture"
#endif

static char script[1 << 16], text[1 << 16], line[1 << 14];
static unsigned long filled;
static int log_file;

static void flush(void)
{
	unsigned long done = 0;

	while (done < filled) {
		long count = call(WRITE, 1, (long)(line + done), filled - done, 0);

		if (count <= 0)
			break;
		done += count;
	}
	filled = 0;
}

static void put(char c)
{
	if (filled == sizeof(line))
		flush();
	line[filled++] = c;
}

/* Put what others wrote: nothing in it may end our line. */
static void quote(unsigned char c)
{
	put(c < ' ' || c == 127 ? '?' : c);
}

static void say(const char *words)
{
	while (*words)
		put(*words++);
}

static void number(unsigned long value)
{
	if (value >= 10)
		number(value / 10);
	put('0' + value % 10);
}

static void begin(const char *which, const char *what)
{
	say("@@ ");
	say(which);
	put(' ');
	say(what);
	put(' ');
}

static void end(void)
{
	put('\n');
	flush();
}

static long slurp(const char *path, char *to, long room)
{
	long file = call(OPENAT, AT_FDCWD, (long)path, O_RDONLY, 0), size = 0, count = 0;

	if (file < 0)
		return file;
	while (size < room - 1 && (count = call(READ, file, (long)(to + size), room - 1 - size, 0)) > 0)
		size += count;
	call(CLOSE, file, 0, 0, 0);
	to[size] = 0;
	return count < 0 ? count : size;
}

/* Hand on what the kernel has logged since the last time: each record is "<numbers>;<message>\n<details>". */
static void tell_log(const char *which)
{
	for (;;) {
		long size = call(READ, log_file, (long)text, sizeof(text) - 1, 0);
		char *at = text;

		if (size == -EPIPE)	/* the ring has gone on without us: what is left of it can be read */
			continue;
		if (size <= 0)
			return;
		text[size] = 0;
		while (*at && *at != ';')
			at++;
		begin(which, "kernel");
		for (at += *at == ';'; *at && *at != '\n'; at++)
			quote(*at);
		end();
	}
}

static long load(char *path)
{
	char *parameters = path;
	long file, result;

	while (*parameters && *parameters != ' ')
		parameters++;
	if (*parameters)
		*parameters++ = 0;
	file = call(OPENAT, AT_FDCWD, (long)path, O_RDONLY, 0);
	if (file < 0)
		return file;
	result = call(FINIT, file, (long)parameters, 0, 0);
	call(CLOSE, file, 0, 0, 0);
	return result;
}

static long tell_file(const char *which, const char *path)
{
	long size = slurp(path, text, sizeof(text));
	char *at = text;

	while (size > 0 && *at) {
		begin(which, "text");
		for (; *at && *at != '\n'; at++)
			quote(*at);
		at += *at == '\n';
		end();
	}
	return size < 0 ? size : 0;
}

/* The next word of a line, cut off from it. */
static char *word(char **rest)
{
	char *start = *rest;

	while (**rest && **rest != ' ')
		++*rest;
	if (**rest)
		*(*rest)++ = 0;
	return start;
}

static void carry_out(char *rest)
{
	char *which = word(&rest), *what = word(&rest);
	long result = -22;

	if (*what == 'l')
		result = load(rest);
	else if (*what == 'u')
		result = call(DELETE, (long)rest, O_NONBLOCK, 0, 0);
	else if (*what == 'r')
		result = tell_file(which, rest);
	tell_log(which);
	begin(which, "status");
	number(result < 0 ? -result : 0);
	end();
}

__attribute__((used)) void run(void)
{
	char *at = script;

	call(MOUNT, (long)"proc", (long)"/proc", (long)"proc", 0);
	call(MOUNT, (long)"sysfs", (long)"/sys", (long)"sysfs", 0);
	log_file = call(OPENAT, AT_FDCWD, (long)"/dev/kmsg", O_RDONLY | O_NONBLOCK, 0);
	slurp("/script", script, sizeof(script));
	tell_log("boot");
	while (*at) {
		char *start = at;

		while (*at && *at != '\n')
			at++;
		if (*at)
			*at++ = 0;
		carry_out(start);
	}
	say("@@ end\n");
	flush();
	for (;;)
		call(REBOOT, (long)0xfee1dead, 672274793, RESTART, 0);
}
