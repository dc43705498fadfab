//! NVRTC, the compiler of CUDA sources at run time. It needs no GPU.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};

use libloading::Library;

use super::open;

/// `nvrtcResult`, 0 on success.
type Code = c_int;
type Program = *mut c_void;

/// Options besides the architecture. Without fused multiply-adds results are those of the CPU.
const OPTIONS: [&str; 3] = ["--fmad=false", "-default-device", "-std=c++17"];

/// The loaded NVRTC. It is never unloaded.
pub(super) struct Nvrtc {
    create_program: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile_program: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    destroy_program: unsafe extern "C" fn(*mut Program) -> Code,
    get_log_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    get_log: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    get_cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    get_cubin: unsafe extern "C" fn(Program, *mut c_char) -> Code,
}

impl Nvrtc {
    /// Finds the NVRTC that libtorch has loaded, the system's, or the one installed next to
    /// libtorch.
    ///
    /// # Errors
    /// No library is found; the error holds the loader's message for each path.
    pub(super) fn load() -> Result<Self, String> {
        let mut errors = Vec::new();
        for path in candidates() {
            // NVRTC finds its built-in functions by their name, also if they are loaded already.
            // They lie beside it, in a folder that is not on the loader's path.
            builtins_beside(&path).iter().for_each(|builtins| drop(open(builtins)));
            match open(&path).and_then(Self::bind) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(error) => errors.push(error.to_string()),
            }
        }
        Err(format!("NVRTC, CUDA's compiler, is not found: {}", errors.join("; ")))
    }

    fn bind(library: &'static Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types of the fields match nvrtc.h of CUDA 12 and 13. The library is leaked,
        // so the functions outlive the struct.
        unsafe {
            Ok(Self {
                create_program: *library.get(b"nvrtcCreateProgram\0")?,
                compile_program: *library.get(b"nvrtcCompileProgram\0")?,
                destroy_program: *library.get(b"nvrtcDestroyProgram\0")?,
                get_log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                get_log: *library.get(b"nvrtcGetProgramLog\0")?,
                get_cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                get_cubin: *library.get(b"nvrtcGetCUBIN\0")?,
            })
        }
    }

    /// Compiles a source for GPUs of the architecture, such as `sm_90`, to machine code that the
    /// driver can load. `name` appears in messages.
    ///
    /// # Errors
    /// The source does not compile; the error is the compiler's log.
    pub(super) fn compile(
        &self,
        name: &str,
        source: &str,
        architecture: &str,
    ) -> Result<Vec<u8>, String> {
        let text = |text: &str| CString::new(text).expect("sources and options contain no zero");
        let (file, source) = (text(name), text(source));
        let architecture_option = format!("--gpu-architecture={architecture}");
        let options: Vec<CString> = [architecture_option.as_str()]
            .iter()
            .chain(&OPTIONS)
            .map(|option| text(option))
            .collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: `program` is writable, source and name are terminated texts, and there are no
        // headers.
        let created = unsafe {
            let (source, name) = (source.as_ptr(), file.as_ptr());
            (self.create_program)(&mut program, source, name, 0, std::ptr::null(), std::ptr::null())
        };
        if created != 0 {
            return Err(format!("nvrtcCreateProgram returned {created}"));
        }
        // SAFETY: the program was created above, and the options are as many terminated texts.
        let compiled =
            unsafe { (self.compile_program)(program, options.len() as c_int, options.as_ptr()) };
        let result = if compiled == 0 {
            self.output(program, self.get_cubin_size, self.get_cubin)
                .ok_or_else(|| format!("NVRTC returns no machine code of `{name}`"))
        } else {
            let log = self.output(program, self.get_log_size, self.get_log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let log = log.trim_end_matches('\0').trim_end();
            Err(format!("`{name}` does not compile for {architecture} (NVRTC {compiled}):\n{log}"))
        };
        // SAFETY: the program was created above and is not used again.
        unsafe { (self.destroy_program)(&mut program) };
        result
    }

    /// Reads an output of a program with the function for its size and the one for its bytes.
    fn output(
        &self,
        program: Program,
        get_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
        get_bytes: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    ) -> Option<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the caller keeps the program alive, and `size` is writable.
        if unsafe { get_size(program, &mut size) } != 0 {
            return None;
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: NVRTC writes as many bytes as it has returned for the same program.
        (unsafe { get_bytes(program, bytes.as_mut_ptr().cast()) } == 0).then_some(bytes)
    }
}

/// Where NVRTC may be: on the loader's path, or in a Python installation, in which `torch/lib` and
/// the folders of NVIDIA's wheels have one parent. The version of libtorch's CUDA comes first.
fn candidates() -> Vec<PathBuf> {
    let wheels = beside_libtorch();
    let versions =
        [("libnvrtc.so.13", "nvidia/cu13/lib"), ("libnvrtc.so.12", "nvidia/cuda_nvrtc/lib")];
    let paths = versions.iter().flat_map(|(name, folder)| {
        let in_wheel = wheels.as_ref().map(|wheels| wheels.join(folder).join(name));
        [Some(PathBuf::from(name)), in_wheel]
    });
    paths.flatten().collect()
}

/// The folder that contains `torch/lib`.
fn beside_libtorch() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let libtorch = PathBuf::from(&line[line.find('/')?..]);
    Some(libtorch.ancestors().nth(3)?.to_owned())
}

/// The libraries of NVRTC's built-in functions in the folder of `path`; none for a bare name.
fn builtins_beside(path: &Path) -> Vec<PathBuf> {
    let Some(folder) = path.parent().filter(|folder| folder.is_absolute()) else {
        return Vec::new();
    };
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = files
        .filter(|file| file.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so."));
    paths.map(|file| file.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::SOURCES;
    use super::*;

    #[test]
    #[expect(clippy::print_stdout, reason = "a skipped test prints the reason")]
    fn sources_compile_without_a_gpu_or_the_error_names_the_searched_paths() {
        match Nvrtc::load() {
            Ok(nvrtc) => {
                for (name, source) in SOURCES {
                    let code = nvrtc.compile(name, source, "sm_90").unwrap();
                    if code.starts_with(b"fake") {
                        println!("skipped: the NVRTC of the fake CUDA runtime does not compile");
                        return;
                    }
                    assert_eq!(code[..4], *b"\x7fELF", "{name}");
                }
                let log = nvrtc.compile("wrong.cu", "int x = y;", "sm_90").unwrap_err();
                assert!(log.contains("`wrong.cu` does not compile for sm_90"), "{log}");
                assert!(log.contains("identifier \"y\" is undefined"), "{log}");
            }
            Err(error) => {
                println!("skipped: no NVRTC on this host");
                for path in candidates() {
                    assert!(error.contains(&*path.to_string_lossy()), "{path:?}: {error}");
                }
                assert!(error.contains("libnvrtc.so.13") && error.contains("libnvrtc.so.12"));
            }
        }
    }
}
