// SPDX-License-Identifier: GPL-2.0
/*
 * A PCI bus of its own with one function on it that says it is an NVSwitch of NVIDIA's.
 *
 * nvidia.ko refuses to stay where the PCI bus has neither a GPU nor an NVSwitch. With this one it stays, and so do the
 * modules on top of it: all of them can be loaded where there is no hardware. Nothing but its configuration space is
 * there; nvidia.ko says that it cannot map it, and goes on.
 */
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/version.h>

#define DOMAIN 0x7fff		/* where no firmware puts a bus */
#define VENDOR 0x10de
#define DEVICE 0x1af1
#define CLASS 0x068000		/* bridge of another kind: what nvidia.ko takes for an NVSwitch */

static struct pci_bus *bus;

static int config_read(struct pci_bus *of, unsigned int function, int where, int size, u32 *value)
{
	u8 space[256] = {};

	*value = ~0;
	if (function != PCI_DEVFN(0, 0))
		return PCIBIOS_DEVICE_NOT_FOUND;
	space[PCI_VENDOR_ID] = VENDOR & 0xff;
	space[PCI_VENDOR_ID + 1] = VENDOR >> 8;
	space[PCI_DEVICE_ID] = DEVICE & 0xff;
	space[PCI_DEVICE_ID + 1] = DEVICE >> 8;
	space[PCI_CLASS_DEVICE] = (CLASS >> 8) & 0xff;
	space[PCI_CLASS_DEVICE + 1] = CLASS >> 16;
	*value = 0;
	if (where + size <= (int)sizeof(space))
		memcpy(value, space + where, size);
	return PCIBIOS_SUCCESSFUL;
}

static int config_write(struct pci_bus *of, unsigned int function, int where, int size, u32 value)
{
	return function == PCI_DEVFN(0, 0) ? PCIBIOS_SUCCESSFUL : PCIBIOS_DEVICE_NOT_FOUND;
}

static struct pci_ops access = { .read = config_read, .write = config_write };

#ifdef CONFIG_X86
static struct pci_sysdata data = { .domain = DOMAIN, .node = NUMA_NO_NODE };
#define SYSDATA (&data)
#else
#define SYSDATA NULL
#endif

static int __init nvswitch_init(void)
{
	struct pci_host_bridge *bridge = pci_alloc_host_bridge(0);
	int error;

	if (!bridge)
		return -ENOMEM;
	bridge->ops = &access;
	bridge->sysdata = SYSDATA;
#if defined(CONFIG_PCI_DOMAINS_GENERIC) && LINUX_VERSION_CODE >= KERNEL_VERSION(5, 15, 0)
	bridge->domain_nr = DOMAIN;
#endif
	pci_add_resource(&bridge->windows, &ioport_resource);
	pci_add_resource(&bridge->windows, &iomem_resource);
	error = pci_scan_root_bus_bridge(bridge);
	if (error) {
		pci_free_host_bridge(bridge);
		return error;
	}
	bus = bridge->bus;
	pci_bus_add_devices(bus);
	return 0;
}

static void __exit nvswitch_exit(void)
{
	pci_lock_rescan_remove();
	pci_stop_root_bus(bus);
	pci_remove_root_bus(bus);
	pci_unlock_rescan_remove();
}

module_init(nvswitch_init);
module_exit(nvswitch_exit);
MODULE_DESCRIPTION("An NVSwitch that is not there");
MODULE_LICENSE("GPL");
