//! Shared mappings.

use crate::harness::{mounted, shell};
use crate::kernel;

#[test]
fn what_one_process_writes_into_a_mapping_another_reads() {
    if !kernel::maps_shared() {
        return;
    }
    let mount = mounted!();
    let script = "import mmap,os\n\
        f=open('f','w+b'); f.truncate(100000); m=mmap.mmap(f.fileno(),100000)\n\
        m[5000:5005]=b'hello'; m[99999:100000]=b'!'\n\
        m.flush()\n\
        assert os.pread(f.fileno(),5,5000)==b'hello'\n\
        os.pwrite(f.fileno(),b'WRITE',20000)\n\
        assert m[20000:20005]==b'WRITE', m[20000:20005]\n\
        m.close(); f.close()\n\
        d=open('f','rb').read(); assert len(d)==100000 and d[5000:5005]==b'hello' and d[-1:]==b'!'\n";
    std::fs::write(mount.path("map.py"), script).unwrap();
    shell(&mount.root(), "python3 map.py");
}

#[test]
fn a_private_mapping_runs_a_program() {
    let mount = mounted!();
    assert_eq!(shell(&mount.root(), "cp /bin/echo e; ./e from the mount"), "from the mount\n");
}

#[test]
fn a_kernel_that_maps_nothing_shared_says_so() {
    if kernel::maps_shared() {
        return;
    }
    let mount = mounted!();
    let script = "import mmap,errno\n\
        f=open('f','w+b'); f.truncate(100000)\n\
        try: mmap.mmap(f.fileno(),100000)\n\
        except OSError as e: print(errno.errorcode[e.errno])\n";
    std::fs::write(mount.path("map.py"), script).unwrap();
    assert_eq!(shell(&mount.root(), "python3 map.py"), "ENODEV\n");
}
