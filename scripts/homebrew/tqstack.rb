# Words between @ signs are filled in by scripts/release.sh.
class Tqstack < Formula
  desc "OpenAI-compatible endpoint for Ollama and a TurboQuant-compressed KV cache"
  homepage "@HOMEPAGE@"
  url "@URL@"
  sha256 "@SHA256@"
  license "MIT"

  depends_on "python@3.13"

  on_macos do
    depends_on arch: :arm64
    depends_on macos: :sonoma
  end

  # Wheels' libraries name themselves by @rpath, and have no room for Homebrew's longer names.
  preserve_rpath

  def install
    # Versions are those that the tests ran with.
    lock = (buildpath/"requirements.lock").read
    constraints = buildpath/"constraints.txt"
    constraints.write lock.gsub(/ \\\n +--hash=\S+/, "")
    # Not virtualenv_create: it makes an environment without pip.
    system Formula["python@3.13"].opt_bin/"python3.13", "-m", "venv", libexec
    system libexec/"bin/pip", "install", "--constraint", constraints, buildpath
    bin.install_symlink libexec/"bin/tqstack"
  end

  def caveats
    <<~TEXT
      In a terminal:            tqstack up
      At every login:           tqstack service install
      Settings:                 tqstack config write
      Before brew uninstall:    tqstack service uninstall
    TEXT
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/tqstack --version")
    assert_match "It fits", shell_output("#{bin}/tqstack plan demo")
  end
end
