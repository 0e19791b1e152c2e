//! A closed loop on one worker, to see what it does and to profile it.
//!
//! `ring-load FILE|DISK:VOLUME read|write|fua|mixed DEPTH SECONDS [BYTES]` keeps DEPTH requests of BYTES (4096) at random
//! places of a raw image, or of a volume of a disk, in flight on one worker in this thread, and prints how many ended
//! and what CPU time each took. A volume that is not there is made, empty.

use std::{
    fs::File,
    path::Path,
    ptr::NonNull,
    sync::Arc,
    time::{Duration, Instant},
};

use bedplate_engine::{
    device::{BlockDevice, Durability},
    error::{Error, Result},
    exec::{
        buffer::AlignedBuffer,
        pool::Pool,
        ring::{FrontEnd, Job, Window, Worker},
    },
    image::{BaseImage, BaseSource, Format, device::ImageDevice, qcow2::View},
    units::ByteLen,
    volume::{disk::Disk, life::Origin, record::ImageRef},
};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};

/// Bytes of a volume that this makes.
const NEW_LEN: ByteLen = ByteLen(512 << 20);

/// Volumes stand on the image beside the disk's directory that has their image's name.
struct Beside(std::path::PathBuf);

impl BaseSource for Beside {
    fn open_base(&self, image: &ImageRef) -> Result<Arc<dyn BaseImage>> {
        open_image(&self.0.join(&image.name))
    }
}

fn open_image(path: &Path) -> Result<Arc<dyn BaseImage>> {
    let open = || File::open(path).map_err(|e| Error::io("open", path, e));
    let mut start = [0; 4];
    std::io::Read::read_exact(&mut open()?, &mut start).map_err(|e| Error::io("read", path, e))?;
    bedplate_engine::image::open(open()?, path, Format::of(&start), &View::Active)
}

#[derive(Clone, Copy)]
enum Mix {
    Reads,
    Writes,
    /// Each survives a crash before it is answered.
    DurableWrites,
    Both,
}

struct Loop {
    device: Arc<dyn BlockDevice>,
    mix: Mix,
    buffers: Vec<AlignedBuffer>,
    seed: u64,
    places: u64,
    ended: u64,
    until: Instant,
}

impl Loop {
    fn number(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.seed >> 33
    }

    fn start(&mut self, worker: &mut Worker, token: u32) {
        let (n, kind) = (self.number(), self.number());
        let buffer = &mut self.buffers[token as usize];
        let window = Window { start: NonNull::from(&mut **buffer).cast(), len: buffer.len() };
        let offset = n % self.places * buffer.len() as u64;
        let job = match (self.mix, kind % 10 < 3) {
            (Mix::Reads, _) | (Mix::Both, false) => Job::Read { offset, window },
            (Mix::Writes, _) | (Mix::Both, true) => {
                Job::Write { offset, window, durability: Durability::Volatile }
            }
            (Mix::DurableWrites, _) => Job::Write { offset, window, durability: Durability::Fua },
        };
        let device = self.device.clone();
        #[expect(unsafe_code, reason = "the buffers are lent to the worker")]
        // SAFETY: each buffer has one request at a time, and lives until the loop has ended.
        unsafe {
            worker.start(&device, job, token)
        };
    }
}

impl FrontEnd for Loop {
    fn command_ended(&mut self, _worker: &mut Worker, _token: u32, _result: i32) {}

    fn request_ended(&mut self, worker: &mut Worker, token: u32, result: Result<()>) {
        if let Err(error) = result {
            eprintln!("{error}");
            return worker.handle().clone().stop();
        }
        self.ended += 1;
        if Instant::now() < self.until {
            self.start(worker, token);
        } else {
            worker.handle().clone().stop();
        }
    }

    fn woken(&mut self, _worker: &mut Worker) {}
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage =
        || Error::Invalid("ring-load FILE|DISK:VOLUME read|write|fua|mixed DEPTH SECONDS [BYTES]".into());
    let [what, mix, depth, seconds, rest @ ..] = args.as_slice() else { return Err(usage()) };
    let mix = match mix.as_str() {
        "read" => Mix::Reads,
        "write" => Mix::Writes,
        "fua" => Mix::DurableWrites,
        "mixed" => Mix::Both,
        _ => return Err(usage()),
    };
    let number = |text: &String| text.parse::<u32>().map_err(|_| usage());
    let (depth, seconds) = (number(depth)?, number(seconds)?);
    let len = rest.first().map_or(Ok(4096), number)? as usize;
    let device: Arc<dyn BlockDevice> = match what.split_once(':') {
        Some((disk, volume)) => {
            let beside = Path::new(disk).parent().unwrap_or(Path::new("."));
            let disk = Disk::open(Path::new(disk), Arc::new(Beside(beside.to_owned())))?;
            match disk.volume(volume) {
                Err(Error::NotFound { .. }) => {
                    disk.create_volume(volume, Origin::Empty, Some(NEW_LEN))?;
                    disk.volume(volume)?
                }
                known => known?,
            }
        }
        None => Arc::new(ImageDevice::new(open_image(Path::new(what))?)),
    };
    let mut worker = Worker::new(Arc::new(Pool::start("waiter", 4, || {})?))?;
    let until = Instant::now() + Duration::from_secs(seconds.into());
    let places = device.geometry().size.0 / len as u64;
    let buffers = (0..depth).map(|_| AlignedBuffer::new(len)).collect();
    let mut front = Loop { device, mix, buffers, seed: 1, places, ended: 0, until };
    let (began, used) = (Instant::now(), cpu_micros()?);
    for token in 0..depth {
        front.start(&mut worker, token);
    }
    worker.run(&mut front)?;
    let rate = front.ended as f64 / began.elapsed().as_secs_f64();
    let each = (cpu_micros()? - used) as f64 / front.ended as f64;
    println!("{rate:.0} per second, {each:.2} us of CPU each");
    Ok(())
}

/// What this process has used.
fn cpu_micros() -> Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).map_err(|e| Error::io("ask for", "usage", e.into()))?;
    Ok(usage.user_time().num_microseconds() + usage.system_time().num_microseconds())
}
