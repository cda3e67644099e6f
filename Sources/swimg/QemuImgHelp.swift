import DiskImage
import ImageDrivers
import ImageFormats

/// The help text of a program that is called as qemu-img.
///
/// Programs search qemu-img's help for options before they use them: libguestfs passes `info -U`
/// only if `\binfo\b.*-U\b` matches. So each verb has one line in qemu's form that lists exactly
/// the options of its parser; a test compares the two.
enum QemuImgHelp {
    /// - Parameter verb: the verb to describe; nil or an unknown one describes all verbs.
    static func text(verb: String?) -> String {
        let names = Swimg.commands.compactMap { $0.configuration.commandName }
        let shown = names.filter { $0 == verb || !names.contains(verb ?? "") }
        let lines = shown.map { "  \($0) \(usage[$0] ?? "")" }
        let formats = ImageFormat.all.map(\.name).sorted()
        return """
            \(ProgramName.versionLine)
            usage: qemu-img [-h | --help] [-V | --version] | command [command options]

            Command syntax:
            \(lines.joined(separator: "\n"))

            Supported formats: \(formats.joined(separator: " "))

            """
    }

    /// The line below a mistake on the command line.
    static let pointer = "Try 'qemu-img --help' for more information"

    /// An error of the argument parser, in getopt's words where callers look for them.
    static func parserError(_ message: String) -> ImageError {
        let words = message.split(separator: "'", maxSplits: 2, omittingEmptySubsequences: false)
        let option = words.count > 1 ? words[1].prefix { $0 != " " } : ""
        let theirs: String? =
            switch words[0] {
            case "Unknown option ": "unrecognized option '\(option)'"
            case "Missing value for ": "missing argument for option '\(option)'"
            default: nil
            }
        return .invalid(message).asQemu(theirs, hint: pointer)
    }

    private static let names = "[--object objectdef] [--image-opts]"
    private static let servers = """
        [--connections=number] [--requests=number] [--request-size=size] [--timeout=seconds] \
        [--reconnect=seconds] [--multi-conn] [--header=line] [--cacert=file] [--cert=file] \
        [--key=file] [--insecure] [--unix-socket=path] [--http2] [--retries=number]
        """

    private static let usage = [
        "amend": "\(names) [-p] [-q] [-f fmt] [-t cache] [--force] [-o options] filename",
        "bench": """
        \(names) [-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] \
        [--no-drain] [-o offset] [--pattern=pattern] [-q] [-s buffer_size] [-S step_size] \
        [-t cache] [-w] [-U] \(servers) filename
        """,
        "bitmap": """
        [--merge=source] [--add] [--remove] [--remove-all] [--clear] [--enable] [--disable] \
        \(names) [-b source_file [-F source_fmt]] [-g granularity] [-f fmt] filename bitmap
        """,
        "check": """
        \(names) [-q] [-f fmt] [--output=ofmt] [-r [leaks | all]] [-T src_cache] [-U] \(servers) \
        filename
        """,
        "commit": """
        \(names) [-q] [-f fmt] [-t cache] [-b base] [-r rate_limit] [-d] [-p] \(servers) filename
        """,
        "compare": """
        \(names) [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] \(servers) \
        filename1 filename2
        """,
        "convert": """
        \(names) [--target-image-opts] [--target-is-zero] [--bitmaps] [--skip-broken-bitmaps] \
        [--salvage] [-U] [-C] [--no-clone] [-c] [-p] \
        [-q] [-n] [-f fmt] [-t cache] [-T src_cache] [-O output_fmt] \
        [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] [-S sparse_size] \
        [-r rate_limit] [-m num_coroutines] [--memory=size] [-W] [--digest] \
        [--expect-digest=digest] [--source-digest=digest] [--algorithm=name] [--verify] \
        \(servers) \
        filename [filename2 [...]] output_filename
        """,
        "create": """
        [--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] \
        \(servers) filename [size]
        """,
        "dd": """
        \(names) [-U] [-f fmt] [-O output_fmt] \(servers) \
        [bs=block_size] [count=blocks] [skip=blocks] if=input of=output
        """,
        "digest":
            "\(names) [-f fmt] [--algorithm=name] [-p] [--output=ofmt] [-U] \(servers) filename",
        "info": "\(names) [-f fmt] [--output=ofmt] [--backing-chain] [-U] \(servers) filename",
        "map": """
        \(names) [-f fmt] [--start-offset=offset] [--max-length=len] [--output=ofmt] \
        [--svg=file] [-U] \(servers) filename
        """,
        "measure": """
        [--output=ofmt] [-O output_fmt] [-o options] \
        [--size N | \(names) [-f fmt] [-l snapshot_param] [-U] \(servers) filename]
        """,
        "rebase": """
        \(names) [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] [-u] [-c] \
        [-b backing_file [-F backing_fmt]] \(servers) filename
        """,
        "resize": """
        \(names) [-f fmt] [--preallocation=prealloc] [-q] [--shrink] filename [+ | -]size
        """,
        "snapshot": """
        \(names) [-U] [-q] [-f fmt] [-l | -a snapshot | -c snapshot | -d snapshot] filename
        """,
    ]
}
