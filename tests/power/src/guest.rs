//! The guest: an initial file system with the programs that it runs, and the emulated machine that is switched off.
//!
//! Software emulation, so that it runs wherever qemu does. The machine is ended by SIGKILL: nothing of its memory, its
//! page cache or its queues survives, and what the disk makes of its own is decided in [`crate::disk`].

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{disk::Disk, notes::FAILED};

/// One processor: two would wait for each other on a busy host.
const MACHINE: &str =
    "qemu-system-x86_64 -accel tcg -cpu max -m 512 -display none -no-reboot -nodefaults -nic none";
/// The kernel tells from the time whether the timer works, and a busy host does not give it that.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off";

/// What the guest's kernel needs of its modules.
const MODULES: [&str; 6] = ["virtio_pci", "virtio_blk", "ext4", "xfs", "fuse", "crc32c_generic"];

/// An emulated machine starts slowly on a busy host.
const DEADLINE: Duration = Duration::from_secs(900);
const LOOK: Duration = Duration::from_millis(5);

/// What a machine is started from, made once.
pub struct Image {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Image {
    /// From an unpacked kernel (see the script `kernel`), with these programs and the libraries that they ask for.
    pub fn build(kernel: &Path, programs: &[PathBuf], dir: &Path) -> Result<Image> {
        let version = fs::read_to_string(kernel.join("version"))
            .context("the guest's kernel; run tests/power/kernel")?;
        let root = dir.join("root");
        for name in ["bin", "proc", "sys", "dev", "run", "lib"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).context("the package busybox-static is needed")?;
        for program in programs {
            let name = program.file_name().context("a program has a name")?;
            let into = root.join("bin").join(name);
            // Debug information only makes the machine's start longer.
            run(Command::new("strip").arg("-o").arg(&into).arg(program))?;
            for library in libraries(program)? {
                let place = root.join(library.strip_prefix("/")?);
                fs::create_dir_all(place.parent().context("a library lies somewhere")?)?;
                fs::copy(&library, place)?;
            }
        }
        let mut listed = Vec::new();
        for module in MODULES {
            for file in module_files(kernel, version.trim(), module)? {
                let name = file.file_name().context("a module has a name")?.to_string_lossy().into_owned();
                if !listed.contains(&name) {
                    fs::copy(&file, root.join("lib").join(&name))?;
                    listed.push(name);
                }
            }
        }
        let lines: String = listed.iter().map(|name| format!("/lib/{name}\n")).collect();
        fs::write(root.join("modules"), lines)?;
        fs::write(root.join("init"), include_str!("init.sh"))?;
        fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
        let initramfs = dir.join("initramfs");
        let pack = format!(
            "cd '{}' && find . | cpio --quiet -o -H newc > '{}'",
            root.display(),
            initramfs.display()
        );
        run(Command::new("sh").args(["-c", &pack]))?;
        fs::remove_dir_all(&root)?;
        Ok(Image { kernel: kernel.join("vmlinuz"), initramfs })
    }
}

fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let text = run(Command::new("ldd").arg(program))?;
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(PathBuf::from).collect())
}

/// The module after what it depends on; none when the kernel has it built in or does not know it.
fn module_files(kernel: &Path, version: &str, module: &str) -> Result<Vec<PathBuf>> {
    let mut command = Command::new("modprobe");
    command.arg("-d").arg(kernel).args(["-S", version, "--show-depends", module]);
    let output = command.output().context("modprobe")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("insmod "))
        .map(|file| PathBuf::from(file.trim()))
        .collect())
}

/// Run a program that succeeds; what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A machine that runs. Dropped, it is switched off.
pub struct Guest {
    qemu: Child,
    console: PathBuf,
}

impl Guest {
    /// With the drives as qemu's `-drive` takes them, in their order, and these variables of its first process; what it
    /// prints is kept in `dir`.
    pub fn start(image: &Image, drives: &[String], environment: &str, dir: &Path) -> Result<Guest> {
        let console = dir.join("console");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).args(MACHINE.split(' '));
        command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initramfs);
        command.arg("-append").arg(format!("{KERNEL_WORDS} {environment}"));
        command.arg("-serial").arg(format!("file:{}", console.display()));
        for drive in drives {
            command.arg("-drive").arg(format!("if=virtio,format=raw,cache=none,{drive}"));
        }
        let log = File::create(console.with_extension("qemu"))?;
        let qemu =
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("qemu")?;
        Ok(Guest { qemu, console })
    }

    /// Wait until this is found in a note of a load that works.
    pub fn wait<T>(&mut self, disk: &Disk, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let failed = disk.find_note(|text| text.starts_with(FAILED).then(|| text.to_owned()));
            ensure!(failed.is_none(), "the load {}", failed.unwrap_or_default());
            if let Some(found) = disk.find_note(&find) {
                return Ok(found);
            }
            ensure!(self.qemu.try_wait()?.is_none(), "the guest ended: {}", self.console());
            ensure!(Instant::now() < deadline, "the guest is too slow; its console says: {}", self.console());
            thread::sleep(LOOK);
        }
    }

    fn console(&self) -> String {
        let text = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let said = [text(&self.console), text(&self.console.with_extension("qemu"))];
        said.into_iter().flatten().collect()
    }

    /// SIGKILL, and gone on return.
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.kill();
    }
}
